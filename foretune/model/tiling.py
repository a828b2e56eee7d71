"""MLPs in tiles of rows, for long rows: the widest activations of a layer never exist whole.

    hidden [B, L, H] ──tiles of `rows` tokens──▶ mlp (nothing kept) ──▶ [B, L, H]
    backward: each tile runs again, with its gradient; weight gradients are summed in fp32, rounded once

A gated MLP keeps about 4 x intermediate x 2 bytes a token for backward and needs as much again while it runs: at 64k
tokens of the Qwen2.5-1.5B shape 4.7 GB each. In tiles that is a constant. The price is the MLP's forward pass once more
(sequence-tiled compute: ALST, Bekman et al. 2025); where rows are long, attention is most of the work.

For any family: modules that transformers names ``mlp``, made of linear maps and activations, which treat every row
alike. Parameters must be whole (not ZeRO-3).
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from types import MethodType
from typing import Any

import torch


class _Tiled(torch.autograd.Function):
    """`run` over tiles of rows of `hidden` [..., H]; see the head of this file."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor], rows: int, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.run, ctx.rows = run, rows
        ctx.save_for_backward(hidden, *weights)
        flat = hidden.reshape(-1, hidden.shape[-1])
        output: torch.Tensor | None = None
        for start in range(0, len(flat), rows):
            piece = run(flat[start : start + rows])
            if output is None:
                output = piece.new_empty(len(flat), piece.shape[-1])
            output[start : start + rows] = piece
        assert output is not None, "no rows"
        return output.view(*hidden.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, *weights = ctx.saved_tensors
        flat = hidden.reshape(-1, hidden.shape[-1])
        gradient = grad_output.reshape(-1, grad_output.shape[-1])
        grad_hidden = torch.empty_like(flat)
        sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
        for start in range(0, len(flat), ctx.rows):
            tile = slice(start, start + ctx.rows)
            piece = flat[tile].detach().requires_grad_()
            with torch.enable_grad():
                output = ctx.run(piece)
            grad_hidden[tile], *parts = torch.autograd.grad(output, [piece, *weights], gradient[tile])
            for total, part in zip(sums, parts, strict=True):
                total.add_(part)
        grads = [total.to(w.dtype) for total, w in zip(sums, weights, strict=True)]
        return grad_hidden.view(hidden.shape), None, None, *grads


def tile_mlps(model: Any, rows: int) -> int:
    """Let every MLP of a transformers model, adapted or not, run `rows` rows at a time.

    Returns:
        How many; 0 for a family whose MLPs are not plain maps of rows (experts, dropout, other names).
    """
    mlps = [module for name, module in model.named_modules() if name.endswith(".mlp") and _treats_rows_alike(module)]
    for mlp in mlps:
        mlp.forward = MethodType(_in_tiles(mlp.forward, rows), mlp)
        mlp.tile_rows = rows
    return len(mlps)


def has_tiles(layer: torch.nn.Module) -> bool:
    """Whether `tile_mlps` has changed an MLP of this layer."""
    return any(hasattr(module, "tile_rows") for module in layer.modules())


def _in_tiles(run: Callable[[torch.Tensor], torch.Tensor], rows: int) -> Callable[..., torch.Tensor]:
    def forward(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.numel() <= rows * hidden.shape[-1]:
            return run(hidden)
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        result: torch.Tensor = _Tiled.apply(hidden, run, rows, *weights)  # type: ignore[no-untyped-call]
        return result

    eager: Callable[..., torch.Tensor] = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
    return eager


def _treats_rows_alike(module: torch.nn.Module) -> bool:
    """One input, matrices and vectors only (experts are stacks of matrices), nothing random."""
    takes_one = len(signature(module.forward).parameters) == 1
    flat = all(parameter.dim() <= 2 for parameter in module.parameters())
    random = any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in module.modules())
    return takes_one and flat and not random
