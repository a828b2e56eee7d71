"""A checkpoint that is loaded at another layout holds what it held: masters, moments, counts, weights, to the bit."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foretune.checkpoint import layout
from foretune.checkpoint.consolidate import iterate_weights
from foretune.checkpoint.store import verify
from foretune.checkpoint.whole_states import MASTER, whole_states

SCRIPT = Path(__file__).parent / "relay_checkpoints.py"
STEP = 2
FP32 = [f"llama-fp32-{stage}" for stage in range(4)]
BF16 = [*(f"llama-bf16-{stage}" for stage in range(4)), "llama-bf16-1-fp32-sums"]
#: (as it was saved by two ranks, as it is laid out now): a model keeps its kind, its numbers and its adapters.
OTHERS = [
    ("gpt2-fp32-3", "llama-fp32-2"),
    ("lora-bf16-2", "llama-bf16-3"),
    ("lora-bf16-3", "llama-bf16-2"),
    ("lora-gpt2-fp32-3", "llama-fp32-1"),
    ("qwen2-fp32-2-offload", "llama-fp32-3"),
    ("qwen3-bf16-3-offload", "llama-bf16-1-fp32-sums"),
    ("llama-bf16-1-fp32-sums", "qwen3-bf16-3-offload"),
]
FEW = [
    ("llama-fp32-0", "llama-fp32-3"),
    ("llama-fp32-3", "llama-fp32-0"),
    ("llama-bf16-3", "llama-bf16-1-fp32-sums"),
    ("llama-bf16-1-fp32-sums", "llama-bf16-2"),
    ("llama-bf16-2", "llama-bf16-0"),
    ("llama-bf16-3", "llama-bf16-1-streamed"),
    ("llama-bf16-1-streamed", "llama-bf16-2"),
    ("llama-fp32-3-sgd", "llama-fp32-0"),
    ("llama-fp32-0-sgd", "llama-fp32-2"),
    *OTHERS,
]
ALL = [
    *itertools.product(FP32, FP32),
    *itertools.product(BF16, BF16),
    *OTHERS,
    ("lora-fp32-0", "llama-fp32-3"),
    ("llama-fp32-1", "qwen2-fp32-2-offload"),
    ("frozen-fp32-2", "llama-fp32-3"),
    ("frozen-fp32-3", "llama-fp32-2"),
]


@pytest.mark.parametrize(
    ("ranks", "pairs"),
    [(3, FEW), pytest.param(1, ALL, marks=pytest.mark.slow), pytest.param(3, ALL, marks=pytest.mark.slow)],
    ids=["few at 3", "all at 1", "all at 3"],
)
def test_what_two_ranks_saved(
    engine_checkpoints: Path, start_ranks: Any, tmp_path: Path, ranks: int, pairs: list[tuple[str, str]]
) -> None:
    words = ",".join(f"{source}:{target}" for source, target in pairs)
    start_ranks(ranks, SCRIPT, "--made", engine_checkpoints, "--out", tmp_path, "--pairs", words)
    for source, target in pairs:
        compare(engine_checkpoints / source / "checkpoints", tmp_path / f"{source}-as-{target}")


def compare(before: Path, after: Path) -> None:
    groups = json.loads((after / "groups.json").read_text())
    old, new = (layout.folder_of(checkpoints, STEP) for checkpoints in (before, after))
    was, now = (whole_states(folder, verify(folder), groups=groups) for folder in (old, new))
    assert set(was.tensors) == set(now.tensors)
    moments = [] if "sgd" in after.name else ["exp_avg", "exp_avg_sq"]
    assert was.names == now.names == moments
    assert {key: float(value) for key, value in now.numbers.items()} == ({"step": STEP} if moments else {})
    for name, states in was.tensors.items():
        for key in (MASTER, *was.names):
            assert torch.equal(states[key]().float(), now.tensors[name][key]().float()), (after.name, name, key)
    trained = torch.bfloat16 if "bf16" in after.name else torch.float32
    weights = dict(iterate_weights(new))
    for name, weight in iterate_weights(old):  # at stage 3 they are the masters
        assert torch.equal(weight.to(trained), weights[name].to(trained)), (after.name, name)
