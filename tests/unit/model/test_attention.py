"""Packed attention against each document alone: bounds, masks, sliding windows, grouped heads, every gradient.

The kernels need a GPU; here the same operator is given a CPU implementation in float64, so that everything around it
(bounds, shapes, windows, the way through transformers and through compiled layers) is what training uses.
"""

import copy
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

from foretune.artifacts import IGNORE_INDEX
from foretune.config.schema import LoraConfig
from foretune.model import attention
from foretune.model.adapters import add_adapters
from foretune.model.compilation import compile_layers
from foretune.model.loading import checkpoint_layers
from foretune.model.loss import attach_loss

VOCAB = 67
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.4,
}  # fmt: skip
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.4,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    ),
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "sliding_window": MistralConfig(**SMALL, sliding_window=4),
}  # fmt: skip
#: torch's compiler looks at every tensor's .grad and warns of itself.
QUIET = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
LENGTHS = [[9, 17, 6], [5, 27]]  # documents of two rows of 32 tokens
CALLS: list[int] = []  # of the operator, forward: its tokens


def documents(bounds: torch.Tensor) -> list[slice]:
    return [slice(start, stop) for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]


def weights_of(q: torch.Tensor, k: torch.Tensor, *, window: int, scale: float) -> torch.Tensor:
    """Softmax of one document's scores; q and k [heads, length, d]."""
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])[None]
    seen = (distance >= 0) & ((distance <= window) if window >= 0 else True)
    return torch.softmax((q @ k.mT * scale).masked_fill(~seen, -torch.inf), -1)


def cpu_forward(query, key, value, bounds, longest, scale, window):  # noqa: PLR0917 (the operator's signature)
    """The textbook, one document after the other. [T, heads, d]."""
    assert int(longest) == int(bounds.diff().max())
    CALLS.append(len(query))
    group = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    for here in documents(bounds):
        q, k, v = (t[here].transpose(0, 1) for t in (query, key, value))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        output[here] = (weights_of(q, k, window=window, scale=scale or q.shape[-1] ** -0.5) @ v).transpose(0, 1)
    return output, query.new_zeros((query.shape[1], query.shape[0]), dtype=torch.float32)


def cpu_backward(gradient, query, key, value, output, log_normalizer, bounds, longest, scale, window):  # noqa: PLR0917
    group = query.shape[1] // key.shape[1]
    scale = scale or query.shape[-1] ** -0.5
    d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
    for here in documents(bounds):
        q, k, v, dy = (t[here].transpose(0, 1) for t in (query, key, value, gradient))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        p = weights_of(q, k, window=window, scale=scale)
        dp = dy @ v.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        d_query[here] = (ds @ k).transpose(0, 1)
        for target, repeated in ((d_key, ds.mT @ q), (d_value, p.mT @ dy)):
            target[here] = repeated.unflatten(0, (-1, group)).sum(1).transpose(0, 1)
    return d_query, d_key, d_value


@pytest.fixture(scope="module", autouse=True)
def cpu_kernels() -> Iterator[None]:
    """The operator's implementation on a CPU, for this module."""
    attention._forward_op.register_kernel("cpu", cpu_forward)
    attention._backward_op.register_kernel("cpu", cpu_backward)
    yield
    torch._dynamo.reset()


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).double()


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, VOCAB, (2, 32))
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in LENGTHS])
    bounds, longest = attention.document_bounds(positions)
    labels = torch.randint(0, VOCAB, (2, 32))
    labels[torch.from_numpy(positions) == 0] = IGNORE_INDEX
    return {
        "input_ids": ids,
        "position_ids": torch.from_numpy(positions),
        "shift_labels": labels,
        "document_bounds": torch.from_numpy(bounds),
        "longest_document": torch.tensor(longest),
    }


def plain_loss(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each document by itself, the model's own forward, whole logits."""
    total = torch.zeros((), dtype=torch.float64)
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for length in lengths:
            piece = slice(at, at + length)
            logits = model(input_ids=inputs["input_ids"][row : row + 1, piece], use_cache=False).logits[0]
            total = total + torch.nn.functional.cross_entropy(
                logits, inputs["shift_labels"][row, piece], ignore_index=IGNORE_INDEX, reduction="sum"
            )
            at += length
    return total


def assert_same_gradients(packed: torch.nn.Module, plain: torch.nn.Module) -> None:
    for (name, ours), theirs in zip(packed.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_bounds_are_where_positions_restart() -> None:
    positions = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    bounds, longest = attention.document_bounds(positions)
    assert bounds.dtype == np.int32
    assert bounds.tolist() == [0, 3, 5, 6, 12]
    assert longest == 6


@pytest.mark.parametrize("name", list(CONFIGS))
def test_loss_and_gradients_are_those_of_each_document_alone(name: str) -> None:
    plain, packed = make(name), make(name)
    inputs = batch()
    expected = plain_loss(plain, inputs)
    expected.backward()
    attention.use_packed_attention(packed)
    attach_loss(packed, chunk_tokens=5)
    loss = packed(**inputs)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert_same_gradients(packed, plain)


@QUIET
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("checkpointed", [0, 1, 2])
def test_compiled_layers_give_the_same(checkpointed: int, *, keep: bool) -> None:
    """Traced and differentiated by torch's compiler (its own kernels need a GPU), checkpointed or not."""
    torch._dynamo.reset()
    plain, packed = make("llama").train(), make("llama").train()
    inputs = batch()
    expected = plain_loss(plain, inputs)
    expected.backward()
    attention.use_packed_attention(packed)
    attach_loss(packed, chunk_tokens=5)
    checkpoint_layers(packed, checkpointed)
    assert compile_layers(packed, keep_attention=keep, backend="aot_eager") == 2
    CALLS.clear()
    loss = packed(**inputs)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert_same_gradients(packed, plain)
    assert len(CALLS) == 2 + (0 if keep else checkpointed), "of attention, forward"


@QUIET
def test_other_documents_compile_nothing_anew() -> None:
    """Number and lengths of the documents differ from batch to batch; the compiled layers must not care."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = make("llama").train()
    attention.use_packed_attention(model)
    attach_loss(model, chunk_tokens=5)
    compile_layers(model, backend=counter)
    graphs = []
    for lengths in ([9, 17, 6, 5, 27], [32, 32], [1, 31, 2, 2, 2, 2, 24], [16, 16, 16, 16]):
        positions = np.concatenate([np.arange(n) for n in lengths]).reshape(2, 32)
        bounds, longest = attention.document_bounds(positions)
        inputs = batch() | {
            "position_ids": torch.from_numpy(positions),
            "document_bounds": torch.from_numpy(bounds),
            "longest_document": torch.tensor(longest),
        }
        model(**inputs).backward()
        graphs.append(counter.frame_count)
    assert graphs == [graphs[0]] * 4, "compiled once, for both layers"
    assert graphs[0] == 1
    model.eval()
    with torch.no_grad():
        model(**batch())
    assert counter.frame_count == 1, "only training is compiled"


def test_adapters_under_packed_attention() -> None:
    plain = add_adapters(make("llama"), LoraConfig(r=4), seed=0).double()
    packed = add_adapters(make("llama"), LoraConfig(r=4), seed=0).double()
    inputs = batch()
    expected = plain_loss(plain, inputs)
    expected.backward()
    attention.use_packed_attention(packed)
    attach_loss(packed, chunk_tokens=5)
    loss = packed(**inputs)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert_same_gradients(packed, plain)


def test_without_bounds_it_is_sdpa() -> None:
    """Evaluation and generation, with transformers' masks: padding is still not seen."""
    plain, packed = make("llama").eval(), make("llama").eval()
    attention.use_packed_attention(packed)
    attach_loss(packed, chunk_tokens=5)
    ids = batch()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        expected = plain(**inputs, use_cache=False).logits
        torch.testing.assert_close(packed(**inputs, use_cache=False).logits, expected, rtol=0, atol=0)
    with torch.no_grad():
        theirs = plain.generate(ids[:1, :9], max_new_tokens=5, do_sample=False, pad_token_id=0)
        ours = packed.generate(ids[:1, :9], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert ours.tolist() == theirs.tolist()


def test_what_the_kernels_cannot_do_is_refused_with_a_reason() -> None:
    cuda = torch.device("cuda")
    model = make("llama").bfloat16()
    assert attention.refusal(model, device=cuda) is None
    assert "CUDA" in str(attention.refusal(model, device=torch.device("cpu")))
    assert "16 bits" in str(attention.refusal(model.float(), device=cuda))
    odd = AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, "head_dim": 12})).bfloat16()
    assert "heads of 12" in str(attention.refusal(odd, device=cuda))
    capped = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, query_pre_attn_scalar=8)).bfloat16()
    assert attention.refusal(capped, device=cuda) is not None
    foreign = SimpleNamespace(config=model.config, dtype=torch.bfloat16)
    assert "attention interface" in str(attention.refusal(foreign, device=cuda))
