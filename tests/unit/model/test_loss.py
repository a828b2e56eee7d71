"""The loss against its formula, and the fused path against the model's own logits."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from foretune.artifacts import IGNORE_INDEX
from foretune.config.schema import LoraConfig
from foretune.model.adapters import add_adapters
from foretune.model.loss import attach_loss, linear_cross_entropy

VOCAB = 67
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Larger than usual, so that attention matters and a leak between documents can't hide.
    "initializer_range": 0.4,
}
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.4,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "llama": LlamaConfig(**SMALL),
    "llama_tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "sliding_window": MistralConfig(**SMALL, sliding_window=4),
    "gemma2_softcapped": Gemma2Config(**SMALL, sliding_window=4, query_pre_attn_scalar=8, final_logit_softcapping=5.0),
}


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()


def test_cross_entropy_is_its_formula() -> None:
    """L = -Σ y log ŷ, with y one-hot and ŷ the softmax, in numpy float64."""
    generator = np.random.default_rng(0)
    hidden, weight, bias = (
        generator.normal(size=(13, 8)),
        generator.normal(size=(VOCAB, 8)),
        generator.normal(size=VOCAB),
    )
    labels = generator.integers(0, VOCAB, 13)
    logits = hidden @ weight.T + bias
    predicted = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    one_hot = np.eye(VOCAB)[labels]
    expected = -(one_hot * np.log(predicted)).sum()
    tensors = [torch.from_numpy(array) for array in (hidden, weight, bias, labels)]
    assert float(linear_cross_entropy(*tensors, chunk_tokens=4)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 64])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_are_autograds(chunk_tokens: int, with_bias: bool) -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(11, 8, dtype=torch.float64), torch.randn(VOCAB, 8, dtype=torch.float64)
    bias = torch.randn(VOCAB, dtype=torch.float64) if with_bias else None
    labels = torch.randint(0, VOCAB, (11,))
    gradients = []
    for fused in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, *([bias] if with_bias else []))]
        h, w, b = (*leaves, None)[:3]
        if fused:
            loss = linear_cross_entropy(h, w, b, labels, chunk_tokens=chunk_tokens)
        else:
            loss = torch.nn.functional.cross_entropy(torch.nn.functional.linear(h, w, b), labels, reduction="sum")
        (loss * 0.37).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_no_targets_gives_zero_and_a_gradient_path() -> None:
    """A rank whose row is all padding must still take part in every collective of backward."""
    hidden = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(VOCAB, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden[:0], weight, None, torch.zeros(0, dtype=torch.long), chunk_tokens=4)
    loss.backward()
    assert loss.item() == 0.0
    for leaf in (hidden, weight):
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_fused_path_equals_the_models_own(name: str) -> None:
    """Loss and every gradient, against whole logits; float64, so that only a wrong formula can differ."""
    torch.manual_seed(2)
    ids = torch.randint(0, VOCAB, (2, 12))
    labels = torch.randint(0, VOCAB, (2, 12))
    labels[0, :7] = IGNORE_INDEX
    plain, fused = make(name).double(), make(name).double()
    logits = plain(input_ids=ids, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    expected.backward()
    attach_loss(fused, chunk_tokens=5)
    result = fused(input_ids=ids, position_ids=torch.arange(12).repeat(2, 1), shift_labels=labels)
    result.backward()
    torch.testing.assert_close(result, expected.to(result.dtype), rtol=1e-10, atol=0)
    for (parameter_name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10, msg=parameter_name)
    # Without labels the model is what it was.
    torch.testing.assert_close(fused(input_ids=ids, use_cache=False).logits, logits, rtol=0, atol=0)


def test_frozen_head_gets_no_gradient_and_adapters_do() -> None:
    model = add_adapters(make("llama"), LoraConfig(r=4), seed=0)
    attach_loss(model, chunk_tokens=5)
    ids = torch.randint(0, VOCAB, (2, 12))
    model(input_ids=ids, shift_labels=ids).backward()
    assert model.get_base_model().lm_head.weight.grad is None
    adapters = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 7 * 2, "A and B for each of seven linear layers in two blocks"
    assert all(grad is not None for grad in adapters.values())
    assert all(grad.any() for name, grad in adapters.items() if "lora_B" in name), "B learns from the first step"


def token_losses(model: torch.nn.Module, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **inputs).logits
    labels = torch.roll(ids, -1, dims=1)
    return torch.nn.functional.cross_entropy(logits[0].double(), labels[0], reduction="none")


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, attention) for name in ("gpt2", "llama", "qwen3", "sliding_window") for attention in ("sdpa", "eager")]
    + [("gemma2_softcapped", "eager")],  # it has no SDPA
)
def test_packed_documents_do_not_see_each_other(name: str, attention: str) -> None:
    """Per-token loss in a packed row within 5e-5 nats of each document alone; an all-ones mask must fail the test."""
    model = make(name)
    model.set_attn_implementation(attention)
    torch.manual_seed(3)
    documents = [torch.randint(0, VOCAB, (1, length)) for length in (9, 17, 5)]
    row = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    alone = torch.cat([token_losses(model, document)[:-1] for document in documents])
    inner = torch.cat([torch.arange(d.shape[1]) < d.shape[1] - 1 for d in documents])  # the last predicts nothing here
    isolated = token_losses(model, row, position_ids=positions)[inner]
    leaking = token_losses(model, row, position_ids=positions, attention_mask=torch.ones_like(row))[inner]
    assert (isolated - alone).abs().max() <= 5e-5
    assert (leaking - alone).abs().max() > 0.1, "the negative control must leak, or this test proves nothing"
