"""ZeRO 1 with 16-bit weights and fp32 sums of their gradients (`BF16_Optimizer`): the sums, and the step from them.

    backward ──a 16-bit gradient, as it comes──▶ fp32 sums, flat ──step──▶ reduced ──▶ norm ──▶ fused Adam ──▶ weights
                                                                             └─ finite? clipped by what? ──┘  read last

DeepSpeed 0.19.8 keeps the 16-bit gradients through the step, zeroes them for every micro-batch and has autograd add to
the zeros; then it widens each into a temporary and adds that. Here a gradient is added to its sum and freed: 10 bytes a
parameter through memory instead of 26, and 2 bytes less held.

At the step, of 4 bytes a parameter each: one rank alone multiplies its sums by 1 and copies them onto themselves, sums
are zeroed twice, and the norm is taken tensor by tensor. Here the first gradient of a step overwrites, and the norm is
taken of the flat sums. DeepSpeed waits for the device to learn whether the norm is finite before it asks for anything
else; Adam's kernel can tell by itself (it leaves everything as it is if not), so the host asks for the whole step and
then waits once, and the device has no pause.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from foretune.model.weight_sums import GradientSum, sums_over

#: Elements of a piece whose norm is taken by itself: pieces are summed in fp64.
_PIECE = 1 << 24


class WideSums:
    """Takes over the sums of a `BF16_Optimizer`, and its step where the optimizer is fused Adam.

    Args:
        zero_optimizer: DeepSpeed's wrapper; `applies` says whether it can be.
        optimizer: torch's, inside.
    """

    def __init__(self, zero_optimizer: Any, optimizer: torch.optim.Optimizer) -> None:
        self._zero, self._optimizer = zero_optimizer, optimizer
        for handle in zero_optimizer._grad_acc_hooks:
            handle.remove()
        zero_optimizer._grad_acc_hooks = []
        #: Of every trainable parameter.
        self.of: dict[torch.nn.Parameter, GradientSum] = {}
        self._filled: list[torch.Tensor] = []
        for parameters, totals in zip(zero_optimizer.bf16_groups, zero_optimizer.fp32_groups_gradients, strict=True):
            sums, filled = sums_over(parameters, totals)
            self._filled.append(filled)
            for parameter, one in zip(parameters, sums, strict=True):
                self.of[parameter] = one
                zero_optimizer._grad_acc_hooks.append(parameter.register_post_accumulate_grad_hook(one.take))
        zero_optimizer.reduce_gradients = self._reduce  # called at the boundary, where there is such a method
        zero_optimizer.get_grads_for_norm = self._flat
        zero_optimizer.clear_hp_grads = self._forget
        zero_optimizer.clear_lp_grads = _nothing_to_clear
        if is_fused_adam(optimizer):
            zero_optimizer.step = self._step

    @staticmethod
    def applies(zero_optimizer: Any) -> bool:
        """Whether DeepSpeed keeps whole sums, and adds to them in backward."""
        return (
            type(zero_optimizer) is BF16_Optimizer
            and zero_optimizer.immediate_grad_update
            and not zero_optimizer.has_moe_layers
        )

    @torch.no_grad()
    def _reduce(self, pipeline_parallel: bool = False) -> None:
        """In place of DeepSpeed's reduction: averages over ranks, and zeros where no gradient came."""
        zero = self._zero
        groups = zip(zero.fp32_groups_gradients_flat, zero.fp32_groups_gradients, self._filled, strict=True)
        for index, (flat, totals, filled) in enumerate(groups):
            for number in torch.logical_not(filled).nonzero().flatten().tolist():
                totals[number].zero_()
            group = zero.real_dp_process_group[index]
            ranks = comm.get_world_size(group=group)
            if ranks > 1:
                comm.all_reduce(flat, group=group)
                flat.mul_(1.0 / ranks)

    def _flat(self, for_clipping: bool = False) -> Any:
        """In place of a list of every parameter's sum."""
        flat = list(self._zero.fp32_groups_gradients_flat)
        return flat if for_clipping else (flat, {})

    def _forget(self) -> None:
        for filled in self._filled:
            filled.fill_(False)

    @torch.no_grad()
    def _step(self, closure: None = None) -> None:
        """Norm, Adam and 16-bit weights. Not a finite norm: nothing changes, and `overflow` says so."""
        assert closure is None
        zero, optimizer = self._zero, self._optimizer
        norm = squares_of([piece for flat in zero.fp32_groups_gradients_flat for piece in flat.split(_PIECE)]).sqrt()
        optimizer.grad_scale = clip_factor(norm, float(zero.clip_grad))  # type: ignore[attr-defined]
        optimizer.found_inf = torch.logical_not(torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        sums = zero.fp32_groups_gradient_flat_partition
        for weights, gradient in zip(zero.fp32_groups_flat_partition, sums, strict=True):
            weights.grad = gradient
        optimizer.step()
        zero._lazy_init_hp_params_optimizer_state()
        zero.update_lp_params()
        self._forget()
        measured = float(norm)  # everything is asked for: now the host may wait
        zero.overflow = not math.isfinite(measured)
        zero._global_grad_norm = math.inf if zero.overflow else measured


def is_fused_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's Adam or AdamW, in kernels that can divide gradients and leave everything as it is."""
    is_adam = isinstance(optimizer, torch.optim.Adam)  # AdamW is one
    return is_adam and all(group.get("fused") for group in optimizer.param_groups)


def squares_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Σ x² over all elements of all tensors, float32 []: a tensor's norm in float32, their squares summed in fp64."""
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).double().square().sum().float()


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What gradients of this norm are divided by, float32 []: max(1, norm / max_norm); 1 where nothing is clipped."""
    factor = torch.clamp((norm + 1e-6) / max_norm, min=1.0) if max_norm > 0 else torch.ones_like(norm)
    return factor.float()


def _nothing_to_clear(set_to_none: bool = False) -> None:
    """In place of a loop over 16-bit gradients: each was freed as it was added."""
