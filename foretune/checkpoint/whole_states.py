"""Master weights and optimizer states of a checkpoint as whole tensors by name, whatever ranks and stage wrote it.

    stage 3     *zero_pp_rank_R_…_optim_states.pt   flat sub-groups, each parameter's shard padded to the same length
    stage 1, 2  *zero_pp_rank_R_…_optim_states.pt   flat partitions, with a table of what of each parameter is where
    stage 0     mp_rank_00_model_states.pt          a state for each parameter, in the order of the optimizer's groups

With them a training goes on with another number of ranks or another stage: DeepSpeed's files are cut for one layout.
What reads takes the host memory of one whole tensor at a time; the files are mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    BUFFER_NAMES,
    FP32_FLAT_GROUPS,
    OPTIMIZER_STATE_DICT,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from deepspeed.utils.zero_to_fp32 import GatheredTensor, natural_keys, zero3_partitioned_param_info

from foretune.artifacts import Checkpoint
from foretune.checkpoint.consolidate import load_mapped
from foretune.errors import VerificationFailed

#: The name of the master weight among the states.
MASTER = "master"
#: The one state that is a number: steps done.
COUNT = "step"


@dataclass(frozen=True)
class WholeStates:
    """What an optimizer knows, free of any layout.

    Attributes:
        tensors: parameter name → state name (`MASTER`, ``exp_avg``, …) → what reads it, flat, in its own dtype.
        numbers: states that are one number, the same for every parameter: Adam's ``step``.
        loss_scale: of fp16's dynamic scaler, if there is one.
        buffers: of the module, by name.
    """

    tensors: Mapping[str, Mapping[str, Callable[[], torch.Tensor]]]
    numbers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    loss_scale: float | None = None
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def own_numbers(self) -> dict[str, torch.Tensor]:
        """`numbers` for one parameter or flat tensor: a kernel counts each up by itself."""
        return {key: value.clone() for key, value in self.numbers.items()}

    @property
    def names(self) -> list[str]:
        """Of the states of a parameter, without its master."""
        first = next(iter(self.tensors.values()))
        return [name for name in first if name != MASTER]


def whole_states(checkpoint: Path, manifest: Checkpoint, *, groups: Sequence[Sequence[str]]) -> WholeStates:
    """The states of a verified checkpoint. None of any parameter where no step has been taken yet.

    Args:
        checkpoint: a complete checkpoint folder whose files have been verified (they are pickles).
        manifest: its manifest.
        groups: names of the trained parameters as the optimizer groups them, which stage 0 does not write down.

    Raises:
        VerificationFailed: a rank's file is missing, or the shards are not as long as the parameters.
    """
    names = sorted((name for name in manifest.files if name.startswith("engine/")), key=natural_keys)
    model = load_mapped(checkpoint / next(name for name in names if name.endswith("_model_states.pt")))
    buffers = {name: model["module"][name] for name in model.get(BUFFER_NAMES) or ()}
    if manifest.zero_stage == 0:
        return replace(_of_stage_0(model, groups), buffers=buffers)
    files = [checkpoint / name for name in names if name.endswith("_optim_states.pt")]
    if len(files) != manifest.world_size:
        problem = f"{manifest.world_size} ranks saved it, {len(files)} files of states are there"
        raise VerificationFailed(f"{checkpoint.name}: {problem}")
    shards = [load_mapped(file)[OPTIMIZER_STATE_DICT] for file in files]
    if manifest.zero_stage == 3:
        return replace(_of_stage_3(checkpoint.name, model[PARAM_SHAPES], shards), buffers=buffers)
    return replace(_of_partitions(shards), buffers=buffers)


def _of_stage_0(model: dict[str, Any], groups: Sequence[Sequence[str]]) -> WholeStates:
    """fp32: torch's own state dict beside the weights. 16 bits: DeepSpeed's, with masters in lists by group."""
    saved, names = model["optimizer"], [name for group in groups for name in group]
    if "fp32_groups" in saved:
        masters = dict(zip(names, (master for group in saved["fp32_groups"] for master in group), strict=True))
        states, scale = saved[OPTIMIZER_STATE_DICT]["state"], float(saved["cur_scale"])
    else:
        masters, states, scale = {name: model["module"][name] for name in names}, saved["state"], None
    tensors = {
        name: {MASTER: masters[name].flatten}
        | {key: value.flatten for key, value in states.get(number, {}).items() if key != COUNT}
        for number, name in enumerate(names)
    }
    return WholeStates(tensors, _numbers(states.get(0, {})), scale)


def _of_partitions(shards: list[dict[str, Any]]) -> WholeStates:
    """Stages 1 and 2: a parameter's pieces lie in the partitions of one rank after the other."""
    pieces: dict[str, dict[str, list[torch.Tensor]]] = {}
    for shard in shards:
        flats, states = shard[SINGLE_PARTITION_OF_FP32_GROUPS], shard[BASE_OPTIMIZER_STATE]["state"]
        for number, places in enumerate(shard[PARAM_SLICE_MAPPINGS]):
            parts = {MASTER: flats[number]} | {k: v for k, v in states.get(number, {}).items() if k != COUNT}
            for name, place in places.items():
                of_name = pieces.setdefault(name, {})
                for key, flat in parts.items():
                    of_name.setdefault(key, []).append(flat.narrow(0, place.start, place.numel))
    tensors = {name: {key: _joined(parts) for key, parts in of_name.items()} for name, of_name in pieces.items()}
    first = shards[0]
    return WholeStates(tensors, _numbers(first[BASE_OPTIMIZER_STATE]["state"].get(0, {})), _scale_of(first))


def _of_stage_3(where: str, group_shapes: list[dict[str, torch.Size]], shards: list[dict[str, Any]]) -> WholeStates:
    """Stage 3: as `foretune.checkpoint.consolidate` gathers the masters, for each state."""
    count = len(shards[0][FP32_FLAT_GROUPS])
    states = [shard[OPTIMIZER_STATE_DICT]["state"] for shard in shards]
    flats = {MASTER: [shard[FP32_FLAT_GROUPS] for shard in shards]}
    for key in (key for key in states[0].get(0, {}) if key != COUNT):
        flats[key] = [[state[number][key] for number in range(count)] for state in states]
    starts = [0, *accumulate(flat.numel() for flat in shards[0][FP32_FLAT_GROUPS])]
    tensors: dict[str, dict[str, Callable[[], torch.Tensor]]] = {}
    offset = 0
    for name, shape in (item for shapes in group_shapes for item in shapes.items()):
        length, _ = zero3_partitioned_param_info(shape.numel(), len(shards))
        flat = torch.Size([shape.numel()])
        tensors[name] = {
            key: GatheredTensor(by_rank, starts, offset, length, flat).contiguous for key, by_rank in flats.items()
        }
        offset += length
    if offset != starts[-1]:
        raise VerificationFailed(f"{where}: its shards hold {starts[-1]} elements a rank, its parameters take {offset}")
    return WholeStates(tensors, _numbers(states[0].get(0, {})), _scale_of(shards[0]))


def _numbers(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {COUNT: torch.as_tensor(state[COUNT])} if COUNT in state else {}


def _joined(parts: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    return lambda: torch.cat(parts)


def _scale_of(shard: Mapping[str, Any]) -> float | None:
    scale = getattr(shard.get("loss_scaler"), "cur_scale", None)
    return None if scale is None else float(scale)
