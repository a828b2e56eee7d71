"""Going on at another layout: whole states ──cut as this engine is──▶ the state that DeepSpeed would have saved here.

DeepSpeed's files are cut for one number of ranks and one stage, and its loaders take no others. So a state of this
engine is taken as a form, what is in it is exchanged for the pieces that belong here, and DeepSpeed's own loader reads
it. Every rank reads whole tensors, one at a time, and keeps its share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    FP32_FLAT_GROUPS,
    OPTIMIZER_STATE_DICT,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from foretune.checkpoint.whole_states import MASTER, WholeStates


@dataclass(frozen=True)
class _Piece:
    """Elements [start, start + numel) of a parameter lie in a flat tensor from `offset` on."""

    name: str
    offset: int
    start: int
    numel: int


@torch.no_grad()
def load_whole(zero: Any, names: dict[torch.nn.Parameter, str], whole: WholeStates, *, stage: int) -> None:
    """Give an engine's optimizer and weights the states of `whole`.

    Args:
        zero: DeepSpeed's optimizer; at stage 0 in fp32, torch's.
        names: of the trained parameters.
        stage: of ZeRO.
    """
    if stage == 3:
        _into_stage_3(zero, names, whole)
        return
    for parameter, name in names.items():
        parameter.data.copy_(whole.tensors[name][MASTER]().view(parameter.shape))
    if stage:
        _into_partitions(zero, names, whole)
    else:
        _into_stage_0(zero, names, whole)
    _set_scale(zero, whole)


def _into_stage_0(zero: Any, names: dict[torch.nn.Parameter, str], whole: WholeStates) -> None:
    in_16_bits = isinstance(zero, FP16_UnfusedOptimizer)
    form = zero.state_dict()
    by_group = zero.fp16_groups if in_16_bits else [group["params"] for group in zero.param_groups]
    parameters = [parameter for group in by_group for parameter in group]
    states = {
        number: {key: whole.tensors[names[p]][key]().view(p.shape) for key in whole.names} | whole.own_numbers()
        for number, p in enumerate(parameters)
    }
    if in_16_bits:
        form["fp32_groups"] = [
            [whole.tensors[names[p]][MASTER]().view(p.shape) for p in group] for group in zero.fp16_groups
        ]
        form[OPTIMIZER_STATE_DICT] |= {"state": states}
    else:
        form |= {"state": states}
    zero.load_state_dict(form)


def _into_partitions(zero: Any, names: dict[torch.nn.Parameter, str], whole: WholeStates) -> None:
    """Stages 1 and 2, `BF16_Optimizer` too."""
    form = zero.state_dict()
    groups = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
    masters, states = [], {}
    for number, (group, flat) in enumerate(zip(groups, form[SINGLE_PARTITION_OF_FP32_GROUPS], strict=True)):
        pieces = list(_pieces_of_partition(group, names))
        length = max([flat.numel(), *(piece.offset + piece.numel for piece in pieces)])
        masters.append(_filled(pieces, whole, MASTER, length))
        padded = zero.optimizer.param_groups[number]["params"][0].numel()
        states[number] = {key: _filled(pieces, whole, key, padded) for key in whole.names} | whole.own_numbers()
    form[SINGLE_PARTITION_OF_FP32_GROUPS] = masters
    form[BASE_OPTIMIZER_STATE] |= {"state": states}
    ranks = torch.distributed.get_world_size()
    zero.load_state_dict([form] * ranks, load_optimizer_states=True, load_from_fp32_weights=True)


def _pieces_of_partition(group: list[torch.nn.Parameter], names: dict[torch.nn.Parameter, str]) -> Iterator[_Piece]:
    for parameter in group:
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:  # else none of it is this rank's
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield _Piece(names[parameter], high.start, low.start, high.numel)


def _into_stage_3(zero: Any, names: dict[torch.nn.Parameter, str], whole: WholeStates) -> None:
    zero.checkpoint_event_prologue()
    form = zero.state_dict()
    masters, states = [], {}
    for number, (group, flat) in enumerate(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)):
        pieces = [_piece_of_shard(zero, parameter, names) for parameter in group]
        masters.append(_filled(pieces, whole, MASTER, flat.numel()))
        states[number] = {key: _filled(pieces, whole, key, flat.numel()) for key in whole.names} | whole.own_numbers()
    form[FP32_FLAT_GROUPS] = masters
    form[OPTIMIZER_STATE_DICT] |= {"state": states}
    zero.load_state_dict([form] * torch.distributed.get_world_size())
    _set_scale(zero, whole)
    zero.checkpoint_event_epilogue()


def _piece_of_shard(zero: Any, parameter: torch.nn.Parameter, names: dict[torch.nn.Parameter, str]) -> _Piece:
    """This rank's shard of a parameter; at its end there may be nothing but padding."""
    _, offset, length = zero.grad_position[zero.get_param_id(parameter)]
    start = length * torch.distributed.get_rank()
    left = max(0, min(length, parameter.ds_numel - start))  # type: ignore[attr-defined]
    return _Piece(names[parameter], offset, start, left)


def _filled(pieces: list[_Piece], whole: WholeStates, key: str, length: int) -> torch.Tensor:
    """fp32 [length] in host memory: what the pieces say, zeros between."""
    flat = torch.zeros(length)
    for piece in pieces:
        if piece.numel:
            tensor = whole.tensors[piece.name][key]()
            flat[piece.offset : piece.offset + piece.numel].copy_(tensor[piece.start : piece.start + piece.numel])
    return flat


def _set_scale(zero: Any, whole: WholeStates) -> None:
    """fp16: go on with the loss scale that was found, where both sides have one."""
    if whole.loss_scale is None:
        return
    if isinstance(zero, FP16_UnfusedOptimizer):
        zero.loss_scale_config.cur_scale = whole.loss_scale
    elif hasattr(getattr(zero, "loss_scaler", None), "cur_scale"):
        zero.loss_scaler.cur_scale = whole.loss_scale
