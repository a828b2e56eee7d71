"""Linear maps whose weight gradients are added to their fp32 sums by the matrix product that makes them.

    y = x Wᵀ + b     backward:  gx = g W     gb = Σ g     sum of W's gradients += gᵀ x, in fp32, inside the product

Where gradients of 16 bits are summed in fp32, each is written, read again and added in a pass of its own: 10 bytes a
parameter and micro-batch. cuBLAS adds to an fp32 matrix itself (8 bytes, and no kernel more), and the product is not
rounded to 16 bits first. Measured on an H100 for the shapes of Qwen2.5-1.5B: docs/speed.md.

The product is an operator of its own, so that a compiler sees one opaque call that changes its sum in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from foretune.model.layers import linear_maps


@dataclass(frozen=True)
class GradientSum:
    """Where the gradients of one parameter are added up.

    Attributes:
        total: fp32, of the parameter's shape.
        filled: bool [] on the host: whether `total` has anything of this step; if not, it is to be overwritten.
    """

    total: torch.Tensor
    filled: torch.Tensor

    def add(self, gradient: torch.Tensor) -> None:
        """Add a gradient of the parameter's shape, in any dtype."""
        if self.filled:
            self.total.add_(gradient)
        else:
            self.total.copy_(gradient)
            self.filled.fill_(True)

    def take(self, parameter: torch.Tensor) -> None:
        """Add what autograd left in a parameter, and free it: the hook of a parameter whose gradient is there."""
        if parameter.grad is not None:  # else its product has added it
            self.add(parameter.grad)
            parameter.grad = None


def sums_over(
    parameters: Sequence[torch.nn.Parameter], totals: Sequence[torch.Tensor]
) -> tuple[list[GradientSum], torch.Tensor]:
    """(a sum of each parameter, all their flags bool [n]), where `totals` are pieces of one flat tensor or more.

    Each is a tensor of its own in autograd's eyes (`.data`): it takes a change of one piece as one of all others, which
    it has kept for backward.
    """
    filled = torch.zeros(len(parameters), dtype=torch.bool)
    pieces = zip(parameters, totals, filled.unbind(), strict=True)
    return [GradientSum(total.view(weight.shape).data, flag.data) for weight, total, flag in pieces], filled


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, overwrite: bool = False) -> None:
    """``total += left @ right``, or ``=``: [m, n] in float32, factors of 16 bits or `total`'s dtype."""
    if left.is_cuda and left.dtype != total.dtype:  # cuBLAS adds in the wide dtype itself: no product in memory
        torch.addmm(total, left, right, beta=0 if overwrite else 1, out_dtype=total.dtype, out=total)
    elif overwrite:
        total.copy_(left @ right)
    else:
        total += left @ right


@torch.library.custom_op("foretune::add_weight_gradient", mutates_args=("total", "filled"))
def _add_weight_gradient(
    total: torch.Tensor, filled: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor
) -> None:
    """total [out, in] of `GradientSum` (+)= gradient [T, out]ᵀ hidden [T, in]. `filled` lies on the host: no wait."""
    add_product(total, gradient.T, hidden, overwrite=not filled)
    filled.fill_(True)


@_add_weight_gradient.register_fake
def _(total: torch.Tensor, filled: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """A compiler needs no more than what is changed."""


class _Linear(torch.autograd.Function):
    """See the head of this file. The weight gets no gradient from autograd."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes by position)
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        total: torch.Tensor,
        filled: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, total, filled)
        return F.linear(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, total, filled = ctx.saved_tensors
        rows, outer = hidden.reshape(-1, hidden.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        torch.ops.foretune.add_weight_gradient(total, filled, outer, rows)
        grad_hidden = (outer @ weight).view(hidden.shape) if ctx.needs_input_grad[0] else None
        grad_bias = outer.sum(0) if ctx.needs_input_grad[2] else None
        return grad_hidden, None, grad_bias, None, None


class SummedLinear(torch.nn.Linear):
    """A linear map that adds its weight's gradients to `gradient_total` itself."""

    gradient_total: torch.Tensor
    gradient_filled: torch.Tensor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., in] → [..., out]."""
        if not torch.is_grad_enabled():
            return F.linear(hidden, self.weight, self.bias)
        output: torch.Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            hidden, self.weight, self.bias, self.gradient_total, self.gradient_filled
        )
        return output


def sum_inside(model: Any, sums: Mapping[torch.nn.Parameter, GradientSum]) -> int:
    """Let the linear maps inside the decoder layers of a transformers model add to `sums` inside their products.

    To be called after the engine took the model. Left alone: weights that several modules share (their gradients are
    summed before), modules with a forward of their own, and whatever else has weights.

    Returns:
        How many.
    """
    places = Counter(
        id(parameter)
        for _, module in model.named_modules(remove_duplicate=False)
        for parameter in module.parameters(recurse=False)
    )
    count = 0
    for linear in linear_maps(model):
        weight = linear.weight
        assert isinstance(weight, torch.nn.Parameter)
        if weight in sums and places[id(weight)] == 1 and "forward" not in vars(linear):
            linear.__class__ = SummedLinear
            linear.gradient_total, linear.gradient_filled = sums[weight].total, sums[weight].filled
            count += 1
    return count
