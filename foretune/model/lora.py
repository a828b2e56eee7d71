"""A linear layer with its low-rank adapter as one function: y = x Wᵀ + b + s (x Aᵀ) Bᵀ, with W and b frozen.

    x [N, in] ──W──▶ y ◀──added inside the matmul── B ◀── x Aᵀ [N, r]   kept for backward, beside x: nothing else

peft's own forward makes B's product, its scaled copy and the sum apart: three more tensors of the size of the layer's
output go through memory; and backward sums two gradients of x. Here both sums happen in the matmul that adds (Hu et al.
2021, §4.1, for the formula). Compiled layers keep peft's own, whose sums the compiler fuses.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F


class _LoraLinear(torch.autograd.Function):
    """See `lora_linear`."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes by position)
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        output = F.linear(rows, weight, bias)
        low = rows @ a.T
        output.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scaling = scaling
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, weight, a, b = ctx.saved_tensors
        rows, outer = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        inner = (outer @ b).mul_(ctx.scaling)  # [N, r]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (outer @ weight).addmm_(inner, a).view_as(x)
        grad_a = inner.T @ rows if ctx.needs_input_grad[3] else None
        grad_b = (outer.T @ low).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_a, grad_b, None


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """x [.., in]; weight [out, in] and bias [out], frozen; a [r, in]; b [out, r]; one dtype. Returns [.., out]."""
    output: torch.Tensor = _LoraLinear.apply(x, weight, bias, a, b, scaling)  # type: ignore[no-untyped-call]
    return output


def fuse_adapters(model: Any) -> int:
    """Let the adapted linear layers of a peft model use `lora_linear`; returns how many do.

    Left alone: layers that are not plain (GPT-2's transposed ones, DoRA, biased or several adapters, dropout). Not for
    ZeRO-3, which makes parameters whole only for the module that owns them.
    """
    from peft.tuners.lora.layer import Linear as LoraLinear

    count = 0
    for module in model.modules():
        if type(module) is LoraLinear and _is_plain(module):
            module.forward = MethodType(_forward, module)
            count += 1
    return count


def _is_plain(module: Any) -> bool:
    names = list(module.active_adapters)
    if type(module.base_layer) is not torch.nn.Linear or len(names) != 1 or module.fan_in_fan_out:
        return False
    name = names[0]
    parameters = [module.base_layer.weight, module.lora_A[name].weight, module.lora_B[name].weight]
    return (
        not module.base_layer.weight.requires_grad
        and isinstance(module.lora_dropout[name], torch.nn.Identity)
        and module.lora_A[name].bias is None
        and module.lora_B[name].bias is None
        and name not in getattr(module, "lora_variant", {})
        and len({parameter.dtype for parameter in parameters}) == 1
    )


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    weight = self.base_layer.weight
    if self.disable_adapters or self.merged or args or kwargs or x.dtype != weight.dtype:
        output: torch.Tensor = type(self).forward(self, x, *args, **kwargs)
        return output
    name = self.active_adapters[0]
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    return lora_linear(x, weight, self.base_layer.bias, a=a, b=b, scaling=float(self.scaling[name]))
