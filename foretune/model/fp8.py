"""Linear maps in 8-bit floats, scaled per tensor as they come: other numerics than bf16, for those who ask for them.

    y = x Wᵀ    x, W in e4m3          gx = g W    g in e5m2          gW = gᵀ x          each sum in fp32, out in bf16

Micikevicius et al. 2022 (FP8 formats for deep learning): e4m3 for activations and weights, e5m2 for gradients. The
scale of a tensor is its largest magnitude over the format's, found anew each time, so nothing is remembered and nothing
saturates. Matrix units take 8-bit operands at twice the rate of bf16; the casts and the search for the largest value
are what it costs, and are fused where layers are compiled. Master weights, optimizer and sums stay as they are.

Head, embedding and attention stay in bf16. Hopper's kernels want both operands with the summed dimension last, in
multiples of 16.
"""

from __future__ import annotations

from typing import Any

import torch

from foretune.model.layers import linear_maps

#: The kernels' unit of both dimensions of a matrix.
MULTIPLE = 16
_SMALLEST = 1e-12


class Float8Linear(torch.nn.Linear):
    """A linear map whose three matmuls are in 8 bits while it is trained.

    Without gradients (held-out losses, probes, the logits that an export must reproduce) it is what will be exported.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., inputs] in 16 bits → [..., outputs] in the same dtype."""
        if not torch.is_grad_enabled():
            return super().forward(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        output: torch.Tensor = _Matmul.apply(flat, self.weight)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            output = output + self.bias
        return output.view(*hidden.shape[:-1], output.shape[-1])


class _Matmul(torch.autograd.Function):
    """x [T, in], W [out, in] → x Wᵀ [T, out]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        x8, x_scale = _cast(x, torch.float8_e4m3fn)
        w8, w_scale = _cast(weight, torch.float8_e4m3fn)
        return _product(x8, x_scale, w8, w_scale, fast=True, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        g8, g_scale = _cast(gradient, torch.float8_e5m2)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            w8, w_scale = _cast(weight, torch.float8_e4m3fn)
            grad_x = _product(g8, g_scale, w8.t().contiguous(), w_scale, fast=False, dtype=x.dtype)
        if ctx.needs_input_grad[1]:
            if len(x) % MULTIPLE:  # the sum runs over the rows
                grad_weight = gradient.t() @ x
            else:
                x8, x_scale = _cast(x, torch.float8_e4m3fn)
                left, right = g8.t().contiguous(), x8.t().contiguous()
                grad_weight = _product(left, g_scale, right, x_scale, fast=False, dtype=weight.dtype)
        return grad_x, grad_weight


def float8_linears(model: Any) -> int:
    """Let the linear maps inside decoder layers of a transformers model, adapted or not, compute in 8 bits.

    Returns:
        How many; those with a dimension that is no multiple of 16 stay as they are.
    """
    count = 0
    for linear in linear_maps(model):
        if linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0:
            linear.__class__ = Float8Linear
            count += 1
    return count


def refusal(device: torch.device) -> str | None:
    """Why linear maps cannot be in 8 bits here; None if they can."""
    if device.type != "cuda":
        return "8-bit matrix units are in GPUs"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "this GPU has no 8-bit matrix units (Ada, Hopper and later have)"
    return None


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(tensor / scale in 8 bits, scale fp32 [])."""
    largest = tensor.detach().abs().amax().float().clamp(min=_SMALLEST)
    scale = largest / torch.finfo(dtype).max
    return (tensor.float() / scale).to(dtype), scale


def _product(
    left: torch.Tensor,
    left_scale: torch.Tensor,
    right: torch.Tensor,
    right_scale: torch.Tensor,
    *,
    fast: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """left [m, k] · right [n, k]ᵀ, with the scales put back. `fast` keeps fewer bits of the running sum."""
    result: torch.Tensor = torch._scaled_mm(
        left, right.t(), scale_a=left_scale, scale_b=right_scale, out_dtype=dtype, use_fast_accum=fast
    )
    return result
