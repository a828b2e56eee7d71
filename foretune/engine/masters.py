"""`BF16_Optimizer` built without the fp32 copy of the weights that it makes: for states that lie elsewhere.

    DeepSpeed: 16-bit weights, flat ──clone──▶ ──float()──▶ master weights, 4 bytes a parameter on the device
    here:                                      ──float()──▶ a tensor of the same shape with the memory of one element

Master weights are the 16-bit weights, widened, until the first step changes them, so whoever keeps them elsewhere, or
keeps none, can make them from those. On the device they would be the peak of a whole training (10 bytes a parameter
with weights and sums: 85 GB for 8.5 billion), for a tensor that leaves at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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
