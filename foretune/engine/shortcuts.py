"""What DeepSpeed 0.19.8 does around an optimizer step that need not be done, for ZeRO 1 and 2 on the device.

    gradients ──norm (float32, one kernel)──▶ is it finite? one wait ──▶ clipping inside fused Adam ──▶ weights

`DeepSpeedZeroOptimizer` looks through all gradients for NaN, waits for the answer, copies each to float64 for the norm,
waits twice more to learn that the norm is finite, and scales the gradients in a pass of their own. The norm alone
answers the first question (NaN and infinity stay what they are in a sum of squares), and Adam's kernel can divide as it
reads.

`BF16_Optimizer` (ZeRO 1 with 16-bit weights and fp32 sums) keeps the 16-bit gradients through the step, zeroes them for
every micro-batch and has autograd add to the zeros; then it widens each into a temporary and adds that. Here a gradient
is added to the sum as it is and freed: 10 bytes a parameter through memory instead of 26, and 2 bytes less held.

Updates stay the same up to rounding (a division for a multiplication; the norm to 1e-6), and a gradient that is not
finite is skipped and reported as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def apply_shortcuts(zero_optimizer: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Put the shortcuts into DeepSpeed's wrapper of ZeRO 1 or 2 around `optimizer`; False if none applies."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if getattr(zero_optimizer, "has_moe_layers", False):
        return False
    if type(zero_optimizer) is BF16_Optimizer:
        zero_optimizer._update_hp_grad = _Accumulate(zero_optimizer)
        if _clip_in_adam(zero_optimizer, optimizer, loss_scale=lambda: 1.0):
            gradients = zero_optimizer.get_grads_for_norm
            zero_optimizer.get_grads_for_norm = lambda for_clipping=False: [] if for_clipping else gradients()
        return True
    if type(zero_optimizer) is not DeepSpeedZeroOptimizer:
        return False
    if zero_optimizer.cpu_offload or not zero_optimizer.compute_grad_norm:
        return False
    scale = zero_optimizer.check_overflow = _NormWillTell(zero_optimizer)
    zero_optimizer.get_grad_norm_direct = _Norm(zero_optimizer)
    if _clip_in_adam(zero_optimizer, optimizer, loss_scale=lambda: scale.loss_scale):
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


def _clip_in_adam(zero_optimizer: Any, optimizer: torch.optim.Optimizer, *, loss_scale: Callable[[], float]) -> bool:
    """Give fused Adam the factor to divide by, max(1, norm / max_norm) x the loss scale; False if it isn't that."""
    is_adam = isinstance(optimizer, torch.optim.Adam)  # AdamW is one
    if not is_adam or not all(group.get("fused") for group in optimizer.param_groups):
        return False

    def set_factor(*_: Any) -> None:
        # Read at every step and never changed: DeepSpeed writes it into checkpoints, which others may load.
        max_norm = float(zero_optimizer.clip_grad)
        norm = zero_optimizer._global_grad_norm  # of the unscaled gradients, a tensor on the device
        factor = torch.clamp((norm + 1e-6) / max_norm, min=1.0) if max_norm > 0 else torch.ones_like(norm)
        optimizer.grad_scale = (factor * loss_scale()).float()  # type: ignore[attr-defined]

    optimizer.register_step_pre_hook(set_factor)
    return True


class _Norm:
    """L2 norm of the gradients of one group over all ranks, float32 []; -1 if not finite, as DeepSpeed has it."""

    def __init__(self, zero_optimizer: Any) -> None:
        self._zero = zero_optimizer

    def __call__(self, gradients: Iterable[torch.Tensor], params: object, norm_type: float = 2) -> torch.Tensor:
        assert norm_type == 2
        held = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        if held:
            norms = torch._foreach_norm(held, 2, dtype=torch.float32)
            total = torch.stack(norms).double().square().sum().float()
        else:
            total = torch.zeros((), device=self._zero.device)
        group = self._zero.dp_process_group
        if torch.distributed.get_world_size(group) > 1:
            torch.distributed.all_reduce(total, group=group)
        norm = total.sqrt()
        return torch.where(torch.isfinite(norm), norm, torch.full_like(norm, -1.0))


class _Accumulate:
    """Adds a parameter's 16-bit gradient to its fp32 sum and frees it."""

    def __init__(self, zero_optimizer: Any) -> None:
        self._zero = zero_optimizer

    @torch.no_grad()
    def __call__(self, lp: torch.nn.Parameter, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        if lp.grad is None:
            return
        total = self._zero.fp32_groups_gradients[group_idx][param_idx]
        seen = self._zero.fp32_groups_has_gradients[group_idx]
        gradient = lp.grad.view(total.shape)
        if seen[param_idx]:
            total.add_(gradient)
        else:
            total.copy_(gradient)
        seen[param_idx] = True
        lp._hp_grad = total  # type: ignore[attr-defined]
        lp.grad = None
