"""Whole tensors from real DeepSpeed checkpoints, held bit for bit against the engine that wrote them."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from foretune.artifacts import Checkpoint
from foretune.checkpoint.consolidate import iterate_weights, stored_weights
from foretune.checkpoint.store import commit
from foretune.errors import VerificationFailed

_spec = importlib.util.spec_from_file_location("engine_cases", Path(__file__).parent / "write_engine_checkpoints.py")
assert _spec is not None
assert _spec.loader is not None
_writer = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _writer
_spec.loader.exec_module(_writer)
OTHER_WORLDS = {
    1: ["llama-fp32-3", "llama-bf16-2"],
    3: ["llama-fp32-1", "llama-fp32-3", "llama-bf16-1-fp32-sums", "gpt2-fp32-3", "frozen-fp32-3", "lora-bf16-3"],
    4: ["llama-bf16-2", "qwen3-bf16-3-offload"],
}


def checkpoint_of(folder: Path) -> Path:
    return folder / "checkpoints" / "step-00000002"


def truth_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "truth.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)


def assert_tells_the_truth(folder: Path) -> None:
    """Every trained tensor once, bit for bit; nothing more."""
    truth = truth_of(folder)
    found = list(iterate_weights(checkpoint_of(folder)))
    names = [name for name, _ in found]
    expected = [name for name in truth if not name.startswith("fp32.")]
    if folder.name.startswith("lora"):
        expected = [name for name in expected if ".lora_" in name]
    assert sorted(names) == sorted(expected)
    for name, tensor in found:
        assert tensor.shape == truth[name].shape
        assert torch.equal(tensor.to(truth[name].dtype), truth[name]), name
        if f"fp32.{name}" in truth:
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, truth[f"fp32.{name}"]), name


@pytest.mark.parametrize("case", _writer.CASES)
def test_weights_equal_the_engines(engine_checkpoints: Path, case: str) -> None:
    assert_tells_the_truth(engine_checkpoints / case)


@pytest.mark.parametrize("world_size", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_weights_equal_the_engines_at_other_world_sizes(
    write_checkpoints: Any, tmp_path: Path, world_size: int
) -> None:
    write_checkpoints(tmp_path, cases=",".join(OTHER_WORLDS[world_size]), world_size=world_size)
    for case in OTHER_WORLDS[world_size]:
        assert Checkpoint.read(checkpoint_of(tmp_path / case) / "manifest.json").world_size == world_size
        assert_tells_the_truth(tmp_path / case)


def test_training_changed_the_weights(engine_checkpoints: Path) -> None:
    """The other tests would pass on weights that never left their start; these did."""
    folder = engine_checkpoints / "llama-fp32-3"
    with safe_open(folder / "base" / "model.safetensors", "pt") as base:
        for name, tensor in iterate_weights(checkpoint_of(folder)):
            assert not torch.equal(tensor, base.get_tensor(name)), name


def test_tied_weight_has_its_first_name_only(engine_checkpoints: Path) -> None:
    names = {
        stage: [w.name for w in stored_weights(checkpoint_of(engine_checkpoints / f"llama-fp32-{stage}"))]
        for stage in range(4)
    }
    assert names[0] == names[1] == names[2] == names[3]
    assert "model.embed_tokens.weight" in names[3]
    assert "lm_head.weight" not in names[3]
    untied = stored_weights(checkpoint_of(engine_checkpoints / "llama-untied-bf16-3"))
    assert "lm_head.weight" in [weight.name for weight in untied]


def test_shapes_are_known_before_reading(engine_checkpoints: Path) -> None:
    for case in ("gpt2-bf16-2", "qwen3-bf16-3-offload", "lora-bf16-3"):
        for weight in stored_weights(checkpoint_of(engine_checkpoints / case)):
            tensor = weight.read()
            assert (tuple(tensor.shape), tensor.dtype) == (weight.shape, weight.dtype)


def test_a_flipped_bit_is_refused_before_anything_is_unpickled(engine_checkpoints: Path, tmp_path: Path) -> None:
    checkpoint = copy_of(checkpoint_of(engine_checkpoints / "llama-bf16-3"), tmp_path)
    shard = next(checkpoint.glob("engine/*rank_1*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(VerificationFailed, match=r"optim_states\.pt is damaged"):
        next(iterate_weights(checkpoint))


def test_a_file_that_the_manifest_does_not_name_is_not_read(engine_checkpoints: Path, tmp_path: Path) -> None:
    """Nobody vouched for it, and reading a pickle runs what is in it."""
    checkpoint = copy_of(checkpoint_of(engine_checkpoints / "llama-fp32-3"), tmp_path)
    (checkpoint / "engine" / "zero_pp_rank_2_mp_rank_00_model_states.pt").write_bytes(b"not a checkpoint")
    assert len(list(iterate_weights(checkpoint))) == 20


def test_a_missing_rank_is_named(engine_checkpoints: Path, tmp_path: Path) -> None:
    checkpoint = copy_of(checkpoint_of(engine_checkpoints / "llama-fp32-3"), tmp_path)
    next(checkpoint.glob("engine/*rank_1*optim_states.pt")).unlink()
    manifest = Checkpoint.read(checkpoint / "manifest.json")
    signed = commit(checkpoint.rename(tmp_path / ".step-00000002.partial"), manifest)
    with pytest.raises(
        VerificationFailed, match="2 ranks saved it, but it holds 2 model states and 1 optimizer states"
    ):
        stored_weights(signed)


def test_shards_that_do_not_add_up_are_refused(engine_checkpoints: Path, tmp_path: Path) -> None:
    checkpoint = copy_of(checkpoint_of(engine_checkpoints / "llama-fp32-3"), tmp_path)
    for shard in checkpoint.glob("engine/*optim_states.pt"):
        state = torch.load(shard, weights_only=False)
        groups = state["optimizer_state_dict"]["fp32_flat_groups"]
        groups[-1] = groups[-1][:-1].clone()
        torch.save(state, shard)
    manifest = Checkpoint.read(checkpoint / "manifest.json")
    signed = commit(checkpoint.rename(tmp_path / ".step-00000002.partial"), manifest)
    with pytest.raises(VerificationFailed, match="its parameters take"):
        stored_weights(signed)


def copy_of(checkpoint: Path, parent: Path) -> Path:
    return Path(shutil.copytree(checkpoint, parent / checkpoint.name))
