"""What DeepSpeed 0.19.8 does around an optimizer step that need not be done, for ZeRO 1 and 2 on the device.

    gradients ──norm (float32, one kernel)──▶ is it finite? one wait ──▶ clipping inside fused Adam ──▶ weights

`DeepSpeedZeroOptimizer` looks through all gradients for NaN, waits for the answer, copies each to float64 for the norm,
waits twice more to learn that the norm is finite, and scales the gradients in a pass of their own. The norm alone
answers the first question (NaN and infinity stay what they are in a sum of squares), and Adam's kernel can divide as it
reads. `BF16_Optimizer` (ZeRO 1 with 16-bit weights and fp32 sums): see `foretune.engine.sums`.

Updates stay the same up to rounding (a division for a multiplication; the norm to 1e-6), and a gradient that is not
finite is skipped and reported as before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from foretune.engine.sums import clip_factor, is_fused_adam, squares_of


def apply_shortcuts(zero_optimizer: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Put the shortcuts into DeepSpeed's `DeepSpeedZeroOptimizer` around `optimizer`; False if none applies."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if type(zero_optimizer) is not DeepSpeedZeroOptimizer or getattr(zero_optimizer, "has_moe_layers", False):
        return False
    if zero_optimizer.cpu_offload or not zero_optimizer.compute_grad_norm:
        return False
    scale = zero_optimizer.check_overflow = _NormWillTell(zero_optimizer)
    zero_optimizer.get_grad_norm_direct = _Norm(zero_optimizer)
    if is_fused_adam(optimizer):

        def set_factor(*_: Any) -> None:
            # Read at every step and never changed: DeepSpeed writes it into checkpoints, which others may load.
            norm = zero_optimizer._global_grad_norm  # of the unscaled gradients, a tensor on the device
            factor = clip_factor(norm, float(zero_optimizer.clip_grad))
            optimizer.grad_scale = (factor * scale.loss_scale).float()  # type: ignore[attr-defined]

        optimizer.register_step_pre_hook(set_factor)
        zero_optimizer.unscale_and_clip_grads = _adam_will_scale
    return True


class _NormWillTell:
    """In place of the search for NaN: `step` skips the update if the norm is not finite, all the same.

    Notes the loss scale of these gradients (fp16): DeepSpeed may double it before it divides by it.
    """

    def __init__(self, zero_optimizer: Any) -> None:
        self._zero = zero_optimizer
        self.loss_scale = 1.0

    def __call__(self, partition_gradients: bool = True) -> None:
        self.loss_scale = float(self._zero.loss_scale)


def _adam_will_scale(grad_groups_flat: list[torch.Tensor], total_norm: torch.Tensor) -> None:
    """In place of a pass that scales the gradients."""


class _Norm:
    """L2 norm of the gradients of one group over all ranks, float32 []; -1 if not finite, as DeepSpeed has it."""

    def __init__(self, zero_optimizer: Any) -> None:
        self._zero = zero_optimizer

    def __call__(self, gradients: Iterable[torch.Tensor], params: object, norm_type: float = 2) -> torch.Tensor:
        assert norm_type == 2
        held = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        total = squares_of(held) if held else torch.zeros((), device=self._zero.device)
        group = self._zero.dp_process_group
        if torch.distributed.get_world_size(group) > 1:
            torch.distributed.all_reduce(total, group=group)
        norm = total.sqrt()
        return torch.where(torch.isfinite(norm), norm, torch.full_like(norm, -1.0))
