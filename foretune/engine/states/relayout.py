"""Going on at another layout: whole states ──cut for the ranks that are here──▶ this engine's masters and states.

DeepSpeed's files are cut for one number of ranks and one stage, and its loaders take no others. Every rank reads whole
tensors, one at a time, and copies its share to where it belongs; at stages 0 and 3 DeepSpeed's loader does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from foretune.checkpoint.whole_states import MASTER, WholeStates

Names = dict[torch.nn.Parameter, str]


@dataclass(frozen=True)
class _Piece:
    """Elements [start, start + numel) of a parameter lie in a flat tensor from `offset` on."""

    name: str
    offset: int
    start: int
    numel: int


@torch.no_grad()
def load_whole(zero: Any, module: torch.nn.Module, names: Names, whole: WholeStates, *, stage: int) -> None:
    """Give an engine's optimizer and weights the states of `whole`.

    Args:
        zero: DeepSpeed's optimizer; at stage 0 in fp32, torch's.
        names: of the trained parameters.
        stage: of ZeRO.
    """
    for name, buffer in module.named_buffers():
        if name in whole.buffers:
            buffer.copy_(whole.buffers[name])
    if stage == 3:
        _into_stage_3(zero, names, whole)
    else:
        for parameter, name in names.items():
            parameter.data.copy_(whole.tensors[name][MASTER]().view(parameter.shape))
        if stage:
            _into_partitions(zero, names, whole)
        else:
            _into_stage_0(zero, names, whole)
    _set_scale(zero, whole)


def _into_stage_0(zero: Any, names: Names, whole: WholeStates) -> None:
    in_16_bits = isinstance(zero, FP16_UnfusedOptimizer)
    form = zero.state_dict()
    by_group = zero.fp16_groups if in_16_bits else [group["params"] for group in zero.param_groups]

    def whole_of(parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        # A copy: what is read may be mapped from the checkpoint, whose room on the disk would stay taken.
        return whole.tensors[names[parameter]][key]().view(parameter.shape).clone()

    states = {
        number: {key: whole_of(parameter, key) for key in whole.names} | whole.own_numbers()
        for number, parameter in enumerate(parameter for group in by_group for parameter in group)
    }
    if in_16_bits:
        form["fp32_groups"] = [[whole_of(parameter, MASTER) for parameter in group] for group in by_group]
        form[OPTIMIZER_STATE_DICT] |= {"state": states}
    else:
        form |= {"state": states}
    zero.load_state_dict(form)


def _into_partitions(zero: Any, names: Names, whole: WholeStates) -> None:
    """Stages 1 and 2, `BF16_Optimizer` too: where their flat tensors lie, they are filled."""
    groups = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
    for group, of_optimizer in zip(groups, zero.optimizer.param_groups, strict=True):
        _fill_states(of_optimizer["params"][0], list(_pieces_of_partition(group, names)), zero.optimizer, whole)


def _pieces_of_partition(group: list[torch.nn.Parameter], names: Names) -> Iterator[_Piece]:
    for parameter in group:
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:  # else none of it is this rank's
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield _Piece(names[parameter], high.start, low.start, high.numel)


def _into_stage_3(zero: Any, names: Names, whole: WholeStates) -> None:
    zero.checkpoint_event_prologue()
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        _fill_states(flat, [_piece_of_shard(zero, parameter, names) for parameter in group], zero.optimizer, whole)
    # Its loader is given what is there already, and makes the 16-bit shards of it.
    zero.load_state_dict([zero.state_dict()] * torch.distributed.get_world_size())
    zero.checkpoint_event_epilogue()


def _piece_of_shard(zero: Any, parameter: torch.nn.Parameter, names: Names) -> _Piece:
    """This rank's shard of a parameter; at its end there may be nothing but padding."""
    _, offset, length = zero.grad_position[zero.get_param_id(parameter)]
    start = length * torch.distributed.get_rank()
    left = max(0, min(length, parameter.ds_numel - start))  # type: ignore[attr-defined]
    return _Piece(names[parameter], offset, start, left)


def _fill_states(flat: torch.Tensor, pieces: list[_Piece], optimizer: Any, whole: WholeStates) -> None:
    """Master weights into a flat tensor, and its states into the optimizer, where the flat tensor lies."""
    _fill(flat.data, pieces, whole, MASTER)
    state = optimizer.state[flat]
    for key in whole.names:
        if key not in state:
            state[key] = torch.zeros_like(flat, requires_grad=False)
        _fill(state[key], pieces, whole, key)
    state |= {key: value.to(flat.device) for key, value in whole.own_numbers().items()}


def _fill(flat: torch.Tensor, pieces: list[_Piece], whole: WholeStates, key: str) -> None:
    flat.zero_()
    for piece in pieces:
        if piece.numel:
            tensor = whole.tensors[piece.name][key]()
            flat[piece.offset : piece.offset + piece.numel].copy_(tensor[piece.start : piece.start + piece.numel])


def _set_scale(zero: Any, whole: WholeStates) -> None:
    """fp16: go on with the loss scale that was found, where both sides have one."""
    if whole.loss_scale is None:
        return
    if isinstance(zero, FP16_UnfusedOptimizer):
        zero.loss_scale_config.cur_scale = whole.loss_scale
    elif hasattr(getattr(zero, "loss_scaler", None), "cur_scale"):
        zero.loss_scaler.cur_scale = whole.loss_scale
