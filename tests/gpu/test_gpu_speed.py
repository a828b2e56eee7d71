"""What makes training fast on a GPU, each against the plain path: forward, loss, every gradient. bf16.

The plain path is each document alone, transformers' own forward, whole logits, in float64 on the same rounded weights.
bf16's rounding is the tolerance: errors are relative L2 norms, and at most twice those of the plain path in bf16.
"""

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from zero_1_buffers import sums_of

from foretune.artifacts import IGNORE_INDEX
from foretune.config.schema import LoraConfig
from foretune.data import MicroBatch
from foretune.model import attention, flash_attention_4, quack_kernels, weight_sums
from foretune.model.adapters import add_adapters
from foretune.model.compilation import compile_layers, compiled_graphs, refusal
from foretune.model.fused_qkv import fuse_qkv
from foretune.model.gated_mlp import fuse_mlps
from foretune.model.loading import checkpoint_layers
from foretune.model.loss import attach_loss, linear_cross_entropy
from foretune.model.weight_sums import sum_inside
from foretune.training.objective import to_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
    pytest.mark.filterwarnings("ignore"),  # of torch's compiler about itself
]
CUDA = torch.device("cuda")
VOCAB = 1000
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024,
    "initializer_range": 0.08,
}  # fmt: skip
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=256, n_layer=3, n_head=4, n_positions=1024, initializer_range=0.08, attn_pdrop=0.0,
        embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    ),
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "sliding_window": MistralConfig(**SMALL, sliding_window=33),
}  # fmt: skip
LENGTHS = ([100, 3, 250, 159], [1, 511], [512], [64, 64, 64, 320])


def make(name: str, dtype: torch.dtype = torch.bfloat16, *, lora: bool = False) -> torch.nn.Module:
    """The same rounded weights in any dtype."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.bfloat16)
    if lora:
        model = add_adapters(model, LoraConfig(r=8), seed=0)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model.to(CUDA, dtype).train()


def micro_batch(seed: int = 0, lengths: tuple[list[int], ...] = LENGTHS) -> MicroBatch:
    generator = np.random.default_rng(seed)
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    ids = generator.integers(0, VOCAB, positions.shape)
    labels = np.roll(ids, -1, 1)
    labels[np.roll(positions, -1, 1) == 0] = IGNORE_INDEX
    labels[:, :20] = IGNORE_INDEX
    return MicroBatch(ids, labels, positions, np.zeros_like(ids))


def plain_loss(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Each document by itself, whole logits."""
    total: Any = 0.0
    for ids, labels, positions in zip(batch.input_ids, batch.shift_labels, batch.position_ids, strict=True):
        starts = [*np.flatnonzero(positions == 0).tolist(), len(ids)]
        for start, stop in itertools.pairwise(starts):
            piece = torch.from_numpy(ids[None, start:stop]).to(CUDA)
            logits = model(input_ids=piece, use_cache=False).logits[0]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            target = torch.from_numpy(labels[start:stop]).to(CUDA)
            total = total + torch.nn.functional.cross_entropy(wide, target, ignore_index=IGNORE_INDEX, reduction="sum")
    return total


def gradients_of(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    (loss / 1000).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def error_of(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    assert set(found) == set(exact)
    return {name: float((found[name] - exact[name]).norm() / exact[name].norm().clamp(min=1e-12)) for name in exact}


def check(
    name: str, prepare: Callable[[Any], None], *, lora: bool = False, lengths: tuple[list[int], ...] = LENGTHS
) -> None:
    """Loss to 0.5 % and every gradient, against float64; no worse than twice the plain path's own error in bf16."""
    batch = micro_batch(lengths=lengths)
    exact_model, plain_model, fast = make(name, torch.float64, lora=lora), make(name, lora=lora), make(name, lora=lora)
    exact_loss = plain_loss(exact_model, batch)
    exact = gradients_of(exact_model, exact_loss)
    plain_errors = error_of(gradients_of(plain_model, plain_loss(plain_model, batch)), exact)
    prepare(fast)
    loss = fast(**to_device(batch, CUDA))
    errors = error_of(gradients_of(fast, loss), exact)
    assert float(loss) == pytest.approx(float(exact_loss), rel=5e-3)
    worst = max(errors, key=lambda key: errors[key] / max(plain_errors[key], 5e-3))
    assert errors[worst] <= 2 * max(plain_errors[worst], 5e-3), (worst, errors[worst], plain_errors[worst])


@pytest.mark.parametrize("lengths", [LENGTHS, ([512],) * 4, ([64] * 8,) * 4], ids=["packed", "whole", "equal"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_packed_attention(name: str, lengths: tuple[list[int], ...]) -> None:
    """Documents of one length are a batch, for which cuDNN's kernel is taken where it is the faster."""

    def prepare(model: Any) -> None:
        assert attention.refusal(model, device=CUDA) is None
        attention.use_packed_attention(model)
        attach_loss(model, chunk_tokens=300)

    check(name, prepare, lengths=lengths)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("heads", "size"), [(12, 128), (14, 64)])
@pytest.mark.parametrize("window", [-1, 63])
def test_flash_attention_4(heads: int, size: int, window: int, *, deterministic: bool) -> None:
    """Beside torch's flash kernels, which differ from it by bf16's rounding; in one order of sums bits repeat."""
    generator = torch.Generator(CUDA).manual_seed(0)
    query, key, value, gradient = (
        torch.randn(2048, count, size, device=CUDA, dtype=torch.bfloat16, generator=generator)
        for count in (heads, 2, 2, heads)
    )
    if not flash_attention_4.takes(query):
        pytest.skip("flash-attn-4 is not installed, or not for this device")
    lengths = [700, 3, 250, 1, 1094]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=CUDA)
    most = max(lengths)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        output, normalizer = flash_attention_4.forward(query, key, value, bounds, most, None, window)
        inputs = (gradient, query, key, value, output, normalizer, bounds, most, None, window)
        found, again = flash_attention_4.backward(*inputs), flash_attention_4.backward(*inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    if deterministic:
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    theirs, their_normalizer, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, most, most, 0.0, window < 0, False, window_size_left=window,
        window_size_right=0,
    )  # fmt: skip
    expected = torch.ops.aten._flash_attention_backward(
        gradient, query, key, value, theirs, their_normalizer, bounds, bounds, most, most, 0.0, window < 0,
        torch.zeros(2, dtype=torch.uint64, device=CUDA), torch.empty(0, device=CUDA), window_size_left=window,
        window_size_right=0,
    )  # fmt: skip
    torch.testing.assert_close(normalizer, their_normalizer, rtol=1e-4, atol=1e-4)
    for ours, other in zip((output, *found), (theirs, *expected), strict=True):
        assert float((ours.float() - other.float()).norm() / other.float().norm()) < 5e-3


@pytest.mark.parametrize(("again", "keep"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("checkpointed", [0, 1, 3])
@pytest.mark.parametrize(("name", "lora"), [("qwen2", False), ("gpt2", False), ("llama", True)])
def test_compiled_layers(name: str, checkpointed: int, *, lora: bool, again: bool, keep: bool) -> None:
    assert refusal(CUDA) is None, "this machine should be able to compile"
    torch._dynamo.reset()

    def prepare(model: Any) -> None:
        attention.use_packed_attention(model)
        checkpoint_layers(model, checkpointed)
        attach_loss(model, chunk_tokens=300, fused=True)
        assert compile_layers(model, recompute_pointwise=again, keep_attention=keep) == 3

    check(name, prepare, lora=lora)


def test_nothing_is_compiled_after_the_first_step() -> None:
    torch._dynamo.reset()
    model = make("llama")
    attention.use_packed_attention(model)
    attach_loss(model, chunk_tokens=300, fused=True)
    compile_layers(model)
    graphs = []
    for seed, lengths in enumerate(
        (LENGTHS, ([512],) * 4, ([2] * 256,) * 4, ([500, 12], [7] * 73 + [1], [512], [512]))
    ):
        model(**to_device(micro_batch(seed, lengths), CUDA)).backward()
        graphs.append(compiled_graphs())
    assert graphs[1:] == [graphs[0]] * 3, graphs


def noted_sums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where products will be added: they should be the sums, and not a compiler's copies."""
    written: list[int] = []

    def noting(add: Callable[..., None]) -> Callable[..., None]:
        def noted(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **how: Any) -> None:
            written.append(total.data_ptr())
            add(total, left, right, **how)

        return noted

    monkeypatch.setattr(weight_sums, "add_product", noting(weight_sums.add_product))
    monkeypatch.setattr(quack_kernels, "add_joined_gradient", noting(quack_kernels.add_joined_gradient))
    return written


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointed", [0, 3])
@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_weight_gradients_summed_inside_the_product(
    name: str, checkpointed: int, *, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches against float64: no worse than autograd's gradients in bf16, added up in fp32. In place."""
    torch._dynamo.reset()
    batches = [micro_batch(seed) for seed in (0, 1)]
    exact_model, plain, inside = make(name, torch.float64), make(name), make(name)
    for batch in batches:
        gradients_of(exact_model, plain_loss(exact_model, batch))
    exact = {key: p.grad.double() for key, p in exact_model.named_parameters()}
    written, errors = noted_sums(monkeypatch), []
    for model in (plain, inside):
        sums = sums_of(model)
        if model is inside:
            assert sum_inside(model, sums) == 3 * 7
        attention.use_packed_attention(model)
        checkpoint_layers(model, checkpointed)
        attach_loss(model, chunk_tokens=300, fused=compiled)
        if compiled:
            compile_layers(model)
        for batch in batches:
            scale = 1 / 1000 if model is inside else None  # told beforehand, the head adds to its sum as it computes
            (model(**to_device(batch, CUDA), gradient_scale=scale) / 1000).backward()
        found = {key: sums[p].total.double() for key, p in model.named_parameters()}
        errors.append(error_of(found, exact))
    own, head = {one.total.data_ptr() for one in sums.values()}, sums[inside.lm_head.weight].total.data_ptr()
    assert len([where for where in written if where != head]) == 2 * 3 * 7
    assert head in written
    assert set(written) <= own, "the compiler made copies of the sums"
    worst = max(exact, key=lambda key: errors[1][key] / max(errors[0][key], 5e-3))
    assert errors[1][worst] <= 1.5 * max(errors[0][worst], 5e-3), (worst, errors[1][worst], errors[0][worst])


@pytest.mark.parametrize(("compiled", "keep"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("checkpointed", [0, 3])
@pytest.mark.parametrize("name", ["qwen2", "llama"])
@pytest.mark.parametrize("fuse", [fuse_mlps, fuse_qkv])
def test_fused_products(
    fuse: Callable[[Any], int],
    name: str,
    checkpointed: int,
    *,
    compiled: bool,
    keep: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As above; beside the family's own code, whose gradients are summed inside products too."""
    if fuse is fuse_mlps and not quack_kernels.takes(torch.empty(8, 8, device=CUDA, dtype=torch.bfloat16)):
        pytest.skip("quack-kernels is not installed, or not for this device")
    torch._dynamo.reset()
    batches = [micro_batch(seed) for seed in (0, 1)]
    exact_model = make(name, torch.float64)
    for batch in batches:
        gradients_of(exact_model, plain_loss(exact_model, batch))
    exact = {key: p.grad.double() for key, p in exact_model.named_parameters()}
    written, errors = noted_sums(monkeypatch), []
    for fused in (False, True):
        model = make(name)
        sums = sums_of(model)
        sum_inside(model, sums)
        assert not fused or fuse(model) == 3
        attention.use_packed_attention(model)
        checkpoint_layers(model, checkpointed)
        attach_loss(model, chunk_tokens=300, fused=compiled)
        if compiled:
            compile_layers(model, recompute_pointwise=True, keep_attention=keep)
        for batch in batches:
            (model(**to_device(batch, CUDA), gradient_scale=1 / 1000) / 1000).backward()
        assert set(written) <= {one.total.data_ptr() for one in sums.values()}, "the compiler made copies of the sums"
        written.clear()
        errors.append(error_of({key: sums[p].total.double() for key, p in model.named_parameters()}, exact))
    worst = max(exact, key=lambda key: errors[1][key] / max(errors[0][key], 5e-3))
    assert errors[1][worst] <= 1.5 * max(errors[0][worst], 5e-3), (worst, errors[1][worst], errors[0][worst])


def test_weight_gradients_summed_inside_the_product_are_faster() -> None:
    """Two compiled layers of the Qwen2.5-1.5B shape, 4 rows of 4096: milliseconds forward and backward."""
    shape = Qwen2Config(
        vocab_size=512, hidden_size=1536, intermediate_size=8960, num_hidden_layers=2, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    batch, times = to_device(micro_batch(lengths=([4096],) * 4), CUDA), {}
    batch["input_ids"], batch["shift_labels"] = batch["input_ids"] % 512, batch["shift_labels"].clamp(max=511)
    ways = ("added afterwards", "inside", "and one product for q, k and v")
    for way in ways:
        torch._dynamo.reset()
        with CUDA:
            model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(shape), dtype=torch.bfloat16).train()
        sums = sums_of(model)
        if way != ways[0]:
            sum_inside(model, sums)
        if way == ways[2]:
            assert fuse_qkv(model) == 2
        attention.use_packed_attention(model)
        attach_loss(model, chunk_tokens=4096, fused=True)
        compile_layers(model)
        for _ in range(12):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            (model(**batch) / 1000).backward()
            end.record()
            end.synchronize()
            times.setdefault(way, []).append(start.elapsed_time(end))
        times[way] = min(times[way])
        print(f"{way:30} {times[way]:7.2f} ms", f"{torch.cuda.max_memory_allocated() / 2**30:6.2f} GiB")
    assert times["inside"] < times["added afterwards"], times
    assert times[ways[2]] < 1.02 * times["inside"], times  # a gain of 1 % may drown in noise, a loss should not


@pytest.mark.parametrize("rows", [1, 2, 299, 300, 1000])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("vocabulary", [5003, 5008])  # QuACK takes multiples of 8, where it is installed
def test_fused_cross_entropy(rows: int, vocabulary: int, *, frozen: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(rows, 256, device=CUDA, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, 256, device=CUDA, dtype=torch.bfloat16) * 0.05
    labels = torch.randint(0, vocabulary, (rows,), device=CUDA)
    found, exact = [], []
    for dtype, into in ((torch.bfloat16, found), (torch.float64, exact)):
        h = hidden.detach().to(dtype, copy=True).requires_grad_()
        w = weight.detach().to(dtype, copy=True).requires_grad_(not frozen)
        if dtype == torch.float64:
            loss = torch.nn.functional.cross_entropy(h @ w.T, labels, reduction="sum")
        else:
            loss = linear_cross_entropy(h, w, None, labels, chunk_tokens=300, fused=True)
        (loss * 0.37).backward()
        into[:] = [loss.double(), h.grad.double()] + ([] if frozen else [w.grad.double()])
        assert (w.grad is None) == frozen
    for ours, theirs in zip(found, exact, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-2


def test_cross_entropy_against_torchs_own() -> None:
    """Time and memory beside torch's fused loss where this torch has it (2.13 on), at 4096 x 1536 x 151936."""
    torch.manual_seed(0)
    hidden = torch.randn(4096, 1536, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(151936, 1536, device=CUDA, dtype=torch.bfloat16) * 0.02).requires_grad_()
    labels = torch.randint(0, 151936, (4096,), device=CUDA)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        f"chunks of {chunk}{' fused' if fused else ''}": (
            lambda chunk=chunk, fused=fused: linear_cross_entropy(
                hidden, weight, None, labels, chunk_tokens=chunk, fused=fused
            )
        )
        for chunk in (1024, 2048, 4096)
        for fused in (False, True)
    }
    theirs = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if theirs is not None:
        ways["torch"] = lambda: theirs(hidden, weight, labels, reduction="sum")
    losses = {}
    for name, way in ways.items():
        for _ in range(3):
            hidden.grad = weight.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            loss = way()
            loss.backward()
            end.record()
            end.synchronize()
            losses[name] = float(loss)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        print(f"{name:22} {start.elapsed_time(end):7.2f} ms {peak:6.2f} GiB")
    assert max(losses.values()) == pytest.approx(min(losses.values()), rel=1e-3)


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (1, "bf16"), (2, "fp32")])
def test_a_step_waits_for_the_device_as_little_as_can_be(stage: int, dtype: str) -> None:
    """Per step: is the norm finite, is it to be clipped, the norm, the loss. Nothing per micro-batch, and nothing is
    compiled after the warm-up."""
    script = Path(__file__).parent / "waits_of_a_step.py"
    done = subprocess.run([sys.executable, str(script), str(stage), dtype], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    counts = json.loads(line.removeprefix("RESULT"))
    print(stage, dtype, counts)
    assert counts["copies to the host"] <= 5, counts
    assert counts["graphs later"] == 0, counts
