"""The weights of a checkpoint as whole tensors by name, one at a time, from any ZeRO stage.

    checkpoint/ ──hashes match the manifest──▶ engine/*.pt, mapped, not read
      stage 0-2   mp_rank_00_model_states.pt                the module's state dict, in the trained dtype
      stage 3     zero_pp_rank_R_…_model_states.pt          shapes, shared names, buffers, shards of frozen parameters
                  *zero_pp_rank_R_…_optim_states.pt         shards of the fp32 masters ──gather──▶ one tensor ──▶ caller

Host memory: one whole tensor; everything else is mapped from the files and paged in and out by the kernel.

Traps this knows: a tied weight has two names in DeepSpeed's state dict (here it has the first only, which is what a
model in memory calls it); ``exclude_frozen_parameters`` leaves the second name of a tied frozen weight behind; below
stage 3 the masters are of no use, because the module's weights are exactly their rounding (and a bf16 run with fp32
gradient sums, or stage 0, saves them in forms that DeepSpeed's own ``zero_to_fp32`` refuses).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BUFFER_NAMES,
    FP32_FLAT_GROUPS,
    FROZEN_PARAM_FRAGMENTS,
    FROZEN_PARAM_SHAPES,
    OPTIMIZER_STATE_DICT,
    PARAM_SHAPES,
)
from deepspeed.utils.zero_to_fp32 import GatheredTensor, natural_keys, zero3_partitioned_param_info

from foretune.artifacts import Checkpoint
from foretune.checkpoint.store import verify
from foretune.errors import VerificationFailed

#: Marks peft's own parameters (LoRA's, DoRA's; layers trained whole beside them).
_ADAPTER_MARKS = (".lora_", ".modules_to_save.")


@dataclass(frozen=True)
class StoredWeight:
    """A tensor that can be read from a checkpoint.

    Attributes:
        name: its key in the training module's state dict; the first one if it is tied.
        shape: of the whole tensor.
        dtype: that `read` returns: the trained dtype below stage 3, the master's (float32) at stage 3.
        read: gathers the whole tensor on the CPU.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def iterate_weights(checkpoint: Path, *, verified: Checkpoint | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, whole tensor)`` of every saved parameter and buffer, each once, tied ones under their first name.

    Args and errors as `stored_weights`.
    """
    for weight in stored_weights(checkpoint, verified=verified):
        yield weight.name, weight.read()


def stored_weights(checkpoint: Path, *, verified: Checkpoint | None = None) -> list[StoredWeight]:
    """What `iterate_weights` yields, unread: names, shapes and dtypes are known before any tensor is gathered.

    Args:
        checkpoint: a complete checkpoint folder.
        verified: its manifest, if `foretune.checkpoint.store` has just verified it; otherwise every file is hashed
            here first, for the files are pickles.

    Raises:
        VerificationFailed: a file does not match its hash, or the parts do not make up whole tensors.
    """
    manifest = verified if verified is not None else verify(checkpoint)
    files = sorted((name for name in manifest.files if name.startswith("engine/")), key=natural_keys)
    model_states = [checkpoint / name for name in files if name.endswith("_model_states.pt")]
    if not model_states:
        raise VerificationFailed(f"{checkpoint.name}: it holds no weights (engine/*_model_states.pt)")
    if manifest.zero_stage == 3:
        optimizer_states = [checkpoint / name for name in files if name.endswith("_optim_states.pt")]
        found = _sharded(checkpoint, model_states, optimizer_states, world_size=manifest.world_size)
    else:
        found = _whole(load_mapped(model_states[0]))
    if manifest.method == "lora":
        found = [weight for weight in found if any(mark in weight.name for mark in _ADAPTER_MARKS)]
    empty = [weight.name for weight in found if math.prod(weight.shape) == 0]
    if empty or not found:
        what = f"{len(empty)} empty tensors, for example {empty[0]}" if empty else "no trained weights"
        raise VerificationFailed(f"{checkpoint.name}: it holds {what}")
    return found


def load_mapped(file: Path) -> dict[str, Any]:
    """One of DeepSpeed's files. A pickle: its hash has been compared with the manifest's.

    Mapped: tensors are paged in when they are touched.
    """
    state: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    return state


def _whole(state: dict[str, Any]) -> list[StoredWeight]:
    """Stages 0 to 2: rank 0 saved the module's whole state dict. Tied tensors are told by their memory."""
    found: list[StoredWeight] = []
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    for name, tensor in state["module"].items():
        memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and memory in seen:
            continue
        seen.add(memory)
        found.append(_stored(name, tensor))
    return found


def _stored(name: str, tensor: torch.Tensor) -> StoredWeight:
    return StoredWeight(name, tuple(tensor.shape), tensor.dtype, tensor.contiguous)


def _sharded(
    checkpoint: Path, model_states: list[Path], optimizer_states: list[Path], *, world_size: int
) -> list[StoredWeight]:
    """Stage 3: each rank saved its shard of every parameter, flat and padded to the same length on every rank."""
    if not len(model_states) == len(optimizer_states) == world_size:
        raise VerificationFailed(
            f"{checkpoint.name}: {world_size} ranks saved it, but it holds {len(model_states)} model states and "
            f"{len(optimizer_states)} optimizer states"
        )
    models = [load_mapped(file) for file in model_states]
    masters = [load_mapped(file)[OPTIMIZER_STATE_DICT][FP32_FLAT_GROUPS] for file in optimizer_states]
    buffers = [(name, models[0]["module"][name]) for name in models[0][BUFFER_NAMES]]
    found = {name: _stored(name, tensor) for name, tensor in buffers}
    found |= {weight.name: weight for weight in _frozen(models)}
    found |= {weight.name: weight for weight in _masters(checkpoint, models[0][PARAM_SHAPES], masters)}
    first_names = models[0]["module"]  # in the order of the module; a tied weight's second name has no shard of its own
    return [found[name] for name in first_names if name in found]


def _frozen(models: list[dict[str, Any]]) -> Iterator[StoredWeight]:
    shapes: dict[str, torch.Size] = models[0].get(FROZEN_PARAM_SHAPES) or {}

    for name, shape in shapes.items():
        shards = [model[FROZEN_PARAM_FRAGMENTS][name] for model in models]

        def gather(shards: list[torch.Tensor] = shards, shape: torch.Size = shape) -> torch.Tensor:
            return torch.cat(shards)[: shape.numel()].view(shape)

        yield StoredWeight(name, tuple(shape), shards[0].dtype, gather)


def _masters(
    checkpoint: Path, group_shapes: list[dict[str, torch.Size]], masters: list[list[torch.Tensor]]
) -> Iterator[StoredWeight]:
    """Trainable parameters lie one after the other in the flat groups of each rank, in the order of `group_shapes`."""
    world_size = len(masters)
    starts = [0, *accumulate(group.numel() for group in masters[0])]
    offset = 0
    for name, shape in (item for shapes in group_shapes for item in shapes.items()):
        length, _ = zero3_partitioned_param_info(shape.numel(), world_size)
        gathered = GatheredTensor(masters, starts, offset, length, shape)
        yield StoredWeight(name, tuple(shape), gathered.dtype, gathered.contiguous)
        offset += length
    if offset != starts[-1]:
        raise VerificationFailed(
            f"{checkpoint.name}: its shards hold {starts[-1]} elements a rank, its parameters take {offset}"
        )


def load_weights(model: torch.nn.Module, checkpoint: Path, *, verified: Checkpoint | None = None) -> None:
    """Copy the weights of a checkpoint into a module of the same architecture, casting to the module's dtype.

    A LoRA checkpoint fills the adapters of a peft model and leaves the rest as it is.

    Raises:
        VerificationFailed: as `stored_weights`; or the names or shapes on both sides differ.
    """
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    stored = stored_weights(checkpoint, verified=verified)
    adapters = all(any(mark in weight.name for mark in _ADAPTER_MARKS) for weight in stored)
    wanted = {name for name, _ in model.named_parameters()}
    if adapters:
        wanted = {name for name in wanted if any(mark in name for mark in _ADAPTER_MARKS)}
    missing = sorted(wanted - {weight.name for weight in stored})
    unknown = sorted(
        weight.name for weight in stored if weight.name not in targets or targets[weight.name].shape != weight.shape
    )
    if missing or unknown:
        problem = f"lacks {missing[0]}" if missing else f"holds {unknown[0]}, which the model has not in that shape"
        raise VerificationFailed(f"{checkpoint.name}: it {problem}")
    with torch.no_grad():
        for weight in stored:
            targets[weight.name].copy_(weight.read())
