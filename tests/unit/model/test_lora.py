"""The fused adapter against peft's own forward: outputs and every gradient, float64."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from foretune.config.schema import LoraConfig
from foretune.model.adapters import add_adapters
from foretune.model.loading import checkpoint_layers
from foretune.model.lora import fuse_adapters, lora_linear
from foretune.model.loss import attach_loss

VOCAB = 61
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig(**SMALL), "qwen2_with_biases": Qwen2Config(**SMALL)}


def make(config, **lora):
    torch.manual_seed(0)
    model = add_adapters(AutoModelForCausalLM.from_config(copy.deepcopy(config)), LoraConfig(r=4, **lora), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model.double().train()


def test_the_formula_and_its_gradients() -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    a = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        lora_linear(x, weight, bias, a=a, b=b, scaling=1.7), x @ weight.T + bias + 1.7 * (x @ a.T) @ b.T
    )
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, bias, a=a, b=b, scaling=1.7), (x, a, b))


@pytest.mark.parametrize("checkpointed", [0, 2])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_models_give_the_same(name: str, checkpointed: int) -> None:
    plain, fused = make(CONFIGS[name]), make(CONFIGS[name])
    assert fuse_adapters(fused) == 14
    torch.manual_seed(2)
    ids = torch.randint(0, VOCAB, (2, 12))
    losses = []
    for model in (plain, fused):
        checkpoint_layers(model, checkpointed)
        attach_loss(model, chunk_tokens=7)
        loss = model(input_ids=ids, shift_labels=ids)
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    for (parameter_name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12, msg=parameter_name)


def test_disabled_adapters_are_the_base_model() -> None:
    model = make(CONFIGS["llama"])
    fuse_adapters(model)
    ids = torch.randint(0, VOCAB, (1, 9))
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    assert not torch.allclose(model(input_ids=ids).logits, base)
    model.unload()


def test_nothing_beside_input_and_low_rank_product_is_kept() -> None:
    kept: list[tuple[int, ...]] = []
    x = torch.randn(7, 8, requires_grad=True)
    weight, a = torch.randn(6, 8), torch.randn(2, 8, requires_grad=True)
    b = torch.randn(6, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        lora_linear(x, weight, None, a=a, b=b, scaling=1.0)
    assert sorted(kept) == sorted([(7, 8), (7, 2), (6, 8), (2, 8), (6, 2)])


def test_what_is_not_plain_is_left_alone() -> None:
    assert fuse_adapters(make(CONFIGS["llama"], dropout=0.1)) == 0
    gpt2 = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    assert fuse_adapters(make(gpt2)) == 0
