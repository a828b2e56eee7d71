"""`BF16_Optimizer` built without the fp32 copy of the weights that it makes, and stepped by us: what such steps share.

    DeepSpeed: 16-bit weights, flat ──clone──▶ ──float()──▶ master weights, 4 bytes a parameter on the device
    here:                                      ──float()──▶ a tensor of the same shape with the memory of one element

Master weights are the 16-bit weights, widened, until the first step changes them, so whoever keeps them elsewhere, or
keeps none, can make them from those. On the device they would be the peak of a whole training (10 bytes a parameter
with weights and sums: 85 GB for 8.5 billion), for a tensor that leaves at once.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from torch.utils._python_dispatch import TorchDispatchMode

from foretune.engine.sums import is_fused_adam

#: Adam's, by torch's names.
MOMENTS = ("exp_avg", "exp_avg_sq")


class WithoutMasters(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While a `BF16_Optimizer` is built within this, its fp32 partitions take no memory.

    What it recognises is a flat tensor of 16 bits that is made fp32: `check` says whether that was these alone.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._without = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.float32:
            weights = args[0]
            if weights.dtype is torch.bfloat16 and weights.dim() == 1:
                self._without += 1
                return without_memory(weights.numel(), weights.device)
        return func(*args, **kwargs)

    def check(self, zero_optimizer: Any) -> None:
        """Every partition of what was built is without memory, and nothing else is."""
        partitions = zero_optimizer.fp32_groups_flat_partition
        assert self._without == len(partitions), (self._without, len(partitions))
        assert all(partition.untyped_storage().nbytes() == 4 for partition in partitions)


def without_memory(numel: int, device: torch.device) -> torch.Tensor:
    """fp32 [numel] that takes the memory of one element: torch insists that a gradient lies where its tensor is."""
    return torch.empty(1, device=device).expand(numel)


def can_do_without(zero_optimizer: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Whether DeepSpeed keeps whole fp32 sums beside 16-bit weights, and the optimizer is torch's fused Adam."""
    adam = is_fused_adam(optimizer) and not any(group.get("amsgrad") for group in optimizer.param_groups)
    wide = getattr(zero_optimizer, "grad_acc_dtype", None) == torch.float32
    return type(zero_optimizer) is BF16_Optimizer and wide and adam


def weights_of(zero_optimizer: Any, index: int) -> torch.Tensor:
    """This rank's 16-bit weights of a parameter group, flat."""
    rank = torch.distributed.get_rank(group=zero_optimizer.real_dp_process_group[index])
    weights: torch.Tensor = zero_optimizer.bf16_partitioned_groups[index][rank]
    return weights


def decays_apart(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether weight decay is decoupled from the gradient: AdamW, not Adam."""
    return isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay", False))


def call_before_step(optimizer: torch.optim.Optimizer) -> None:
    """Call what was registered with ``register_step_pre_hook``: for a step that takes the place of torch's."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        hook(optimizer, (), {})


def gather_weights(zero_optimizer: Any) -> None:
    """Give every rank the 16-bit weights of all: the second half of `BF16_Optimizer.update_lp_params`."""
    all_gather_dp_groups(
        groups_flat=zero_optimizer.bf16_groups_flat,
        partitioned_param_groups=zero_optimizer.bf16_partitioned_groups,
        dp_process_group=zero_optimizer.real_dp_process_group,
        start_alignment_factor=zero_optimizer.nccl_start_alignment_factor,
        allgather_bucket_size=zero_optimizer.allgather_bucket_size,
    )
