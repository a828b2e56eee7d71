"""Gated MLPs whose activation is computed inside the products around it, for any family whose MLP is this formula.

    y = (silu(x Gᵀ) ⊙ x Uᵀ) Dᵀ          x [T, h], G and U [i, h], D [h, i]

    forward:   before, product = gated_product(x, [G; U])     one product; SwiGLU is applied to what it has just summed
               y = product Dᵀ
    backward:  d_before, product = gated_backward(dy, D, before)        dy D, SwiGLU's gradients and SwiGLU, in one
               sum of D's gradients += dyᵀ product        of [G; U]'s += d_beforeᵀ x        dx = d_before [G; U]

Apart from them SwiGLU reads and writes 3 i elements a token forward and 6 i backward, 0.17 s of a 2.6 s step of the
1.5B shape on an H100. `product` is made again, so that 2 i are kept. It is rounded to 16 bits once, where gate and up
are rounded before it elsewhere.

Gate and up lie side by side in `before` [T, 2 i]: g₀ u₀ g₁ u₁ …, since one thread needs both. Their weights are read as
one matrix, which they are in the flat buffers of ZeRO-1, and their gradients' sums too (`foretune.model.weight_sums`).

Forward is one operator and backward two, which a compiler takes as they are. None changes two sums: where two tensors
lie in one buffer, torch's compiler lets an operator change a copy of the second. On an H100 that lost gradients (torch
2.11; MLPs of the 1.5B shape learnt wrongly) or read memory that is not there (3B).

On other devices than `quack_kernels` takes, they compute the same in torch's own kernels, slower than a plain MLP: for
tests.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

from foretune.model import quack_kernels
from foretune.model.layers import decoder_layers
from foretune.model.weight_sums import GradientSum, SummedLinear, SummedTogether


@torch.library.custom_op("foretune::gated_product", mutates_args=())
def gated_product(hidden: torch.Tensor, joined: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(before [T, 2 i], silu(gate) ⊙ up [T, i]) of hidden [T, h] and [gate; up] [2 i, h]."""
    if quack_kernels.takes(hidden):
        return quack_kernels.gated(hidden, joined)
    before = _interleaved(hidden @ joined.T)
    return before, _swiglu(before)


@gated_product.register_fake
def _(hidden: torch.Tensor, joined: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    before = hidden.new_empty(hidden.shape[0], joined.shape[0])
    return before, hidden.new_empty(hidden.shape[0], joined.shape[0] // 2)


@torch.library.custom_op("foretune::gated_backward", mutates_args=("down_total", "down_filled"))
def gated_backward(
    gradient: torch.Tensor,
    down: torch.Tensor,
    before: torch.Tensor,
    down_total: torch.Tensor,
    down_filled: torch.Tensor,
) -> torch.Tensor:
    """The gradient of before [T, 2 i] from that of the output [T, h]; that of down is added to its `GradientSum`."""
    compute = quack_kernels.gated_backward if quack_kernels.takes(gradient) else _gated_backward
    d_before, product = compute(gradient, down, before)
    GradientSum(down_total, down_filled).add_product(gradient.T, product)
    return d_before


@gated_backward.register_fake
def _(gradient: torch.Tensor, down: torch.Tensor, before: torch.Tensor, *sums: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(before)


@torch.library.custom_op("foretune::hidden_backward", mutates_args=("joined_total", "joined_filled"))
def hidden_backward(
    d_before: torch.Tensor,
    joined: torch.Tensor,
    hidden: torch.Tensor,
    joined_total: torch.Tensor,
    joined_filled: torch.Tensor,
) -> torch.Tensor:
    """The gradient of hidden [T, h] from that of before [T, 2 i]; that of [gate; up] is added to its `GradientSum`."""
    into = GradientSum(joined_total, joined_filled)
    if not quack_kernels.takes(hidden):
        apart = _apart(d_before)
        into.add_product(apart.T, hidden)
        return apart @ joined
    if joined_total.dtype == torch.float32:
        quack_kernels.add_joined_gradient(joined_total, d_before, hidden, overwrite=into.is_new)
        joined_filled.fill_(True)
    else:
        into.add_product(_apart(d_before).T, hidden)
    return quack_kernels.hidden_gradient(d_before, joined)


@hidden_backward.register_fake
def _(d_before: torch.Tensor, joined: torch.Tensor, hidden: torch.Tensor, *sums: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(hidden)


def _gated_backward(
    gradient: torch.Tensor, down: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quack_kernels.gated_backward`."""
    wide = before.to(torch.promote_types(before.dtype, torch.float32))
    gate, up, outer = wide[:, ::2], wide[:, 1::2], (gradient @ down).to(wide.dtype)
    share = torch.sigmoid(gate)
    d_gate = outer * up * share * (1 + gate * (1 - share))
    return torch.stack([d_gate, outer * F.silu(gate)], 2).flatten(1).to(before.dtype), _swiglu(before)


def _interleaved(apart: torch.Tensor) -> torch.Tensor:
    """[gate | up] [T, 2 i] → g₀ u₀ g₁ u₁ …"""
    return apart.view(len(apart), 2, apart.shape[1] // 2).transpose(1, 2).reshape(apart.shape)


def _apart(interleaved: torch.Tensor) -> torch.Tensor:
    """The way back."""
    return interleaved.view(len(interleaved), interleaved.shape[1] // 2, 2).transpose(1, 2).reshape(interleaved.shape)


def _swiglu(before: torch.Tensor) -> torch.Tensor:
    wide = before.to(torch.promote_types(before.dtype, torch.float32))
    return (F.silu(wide[:, ::2]) * wide[:, 1::2]).to(before.dtype)


class _GatedMLP(torch.autograd.Function):
    """See the head of this file. The weights get no gradients from autograd."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes by position)
        ctx: Any,
        hidden: torch.Tensor,
        down: torch.Tensor,
        joined: torch.Tensor,
        joined_total: torch.Tensor,
        joined_filled: torch.Tensor,
        down_total: torch.Tensor,
        down_filled: torch.Tensor,
    ) -> torch.Tensor:
        before, product = torch.ops.foretune.gated_product(hidden.reshape(-1, hidden.shape[-1]), joined)
        ctx.save_for_backward(hidden, before, down, joined, down_total, down_filled, joined_total, joined_filled)
        return F.linear(product, down).view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, before, down, joined, *sums = ctx.saved_tensors
        outer, rows = (one.reshape(-1, one.shape[-1]).contiguous() for one in (gradient, hidden))
        d_before = torch.ops.foretune.gated_backward(outer, down, before, *sums[:2])
        return torch.ops.foretune.hidden_backward(d_before, joined, rows, *sums[2:]).view(hidden.shape), *[None] * 6


def fuse_mlps(model: Any) -> int:
    """Let the gated MLPs of a transformers model compute as this file says, in training.

    To be called after `weight_sums.sum_inside`. Left alone: MLPs that compute anything else than the formula, have
    biases, whose sums are not their own or whose gate and up do not lie next to each other.

    Returns:
        How many.
    """
    mlps = [module for layer in decoder_layers(model) for module in layer.modules() if _is_gated(module)]
    formulas: dict[type, bool] = {}
    count = 0
    for mlp in mlps:
        if type(mlp) not in formulas:
            formulas[type(mlp)] = _is_the_formula(mlp)
        together = SummedTogether.of([mlp.gate_proj, mlp.up_proj])
        if formulas[type(mlp)] and together is not None and mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape:
            mlp.together = together
            mlp.forward = MethodType(_fused(mlp.forward), mlp)
            count += 1
    return count


def _is_gated(module: Any) -> bool:
    """Three linear maps without bias whose gradients are summed inside, under the names that families give them."""
    maps = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(type(one) is SummedLinear and one.bias is None for one in maps)


@torch.no_grad()
def _is_the_formula(mlp: Any) -> bool:
    """Whether it computes what this file does: tried on a few rows, to the bit."""
    weight = mlp.gate_proj.weight
    rows = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    expected = mlp.down_proj(F.silu(mlp.gate_proj(rows)) * mlp.up_proj(rows))
    return torch.equal(mlp(rows), expected)


def _fused(plain: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return plain(hidden)
        down, joined = self.down_proj, self.together
        output: torch.Tensor = _GatedMLP.apply(  # type: ignore[no-untyped-call]
            hidden, down.weight, joined.weight, joined.total, joined.filled, down.gradient_total, down.gradient_filled
        )
        return output

    return forward
