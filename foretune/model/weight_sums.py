"""Modules whose weight gradients are added to their fp32 sums where they are made.

    linear map   y = x Wᵀ + b     backward:  gx = g W     gb = Σ g     sum of W's gradients += gᵀ x, inside the product
    output head  the same, inside the loss (`foretune.model.loss`)
    embedding    y = W[ids]       backward:  the rows of the sum that ids name += g

Where gradients of 16 bits are summed in fp32, each is written, read again and added in a pass of its own: 10 bytes a
parameter and micro-batch. cuBLAS adds to an fp32 matrix itself (8 bytes, and no kernel more), and the product is not
rounded to 16 bits first. Of the embedding, most rows have no gradient at all, yet autograd makes them all: here only
those that have one are touched. Measured on an H100 for the shapes of Qwen2.5-1.5B: docs/speed.md.

A layer's product is an operator of its own, so that a compiler sees one opaque call that changes its sum in place.
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
        filled: bool [] on the host: whether `total` has anything of this step; if not, it is to be overwritten. Of
            parameters that are one matrix (`side_by_side`) a flag for each [n], which are all alike.
    """

    total: torch.Tensor
    filled: torch.Tensor

    @property
    def is_new(self) -> bool:
        """Whether `total` is to be overwritten."""
        is_filled = bool(self.filled.all())
        assert is_filled == bool(self.filled.any()), "of weights that are one matrix, some have sums and some have not"
        return not is_filled

    def add(self, gradient: torch.Tensor) -> None:
        """Add a gradient of the parameter's shape, in any dtype."""
        if self.is_new:
            self.total.copy_(gradient)
            self.filled.fill_(True)
        else:
            self.total.add_(gradient)

    def add_product(self, left: torch.Tensor, right: torch.Tensor, *, scale: float = 1.0) -> None:
        """Add ``scale · left @ right``, which never is in memory by itself on a GPU."""
        add_product(self.total, left, right, scale=scale, overwrite=self.is_new)
        self.filled.fill_(True)

    def add_rows(self, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Add rows [T, h] of any dtype to the rows that `index` int64 [T] names, in one order on a GPU too."""
        if self.is_new:
            self.total.zero_()
            self.filled.fill_(True)
        into, sums = sums_by_index(index, rows.to(self.total.dtype), at_most=len(self.total))
        self.total.index_add_(0, into, sums)

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


def side_by_side(pieces: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Tensors [n₁, …], [n₂, …], … as one [n₁ + n₂ + …, …] in the same memory, if each follows the one before there."""
    first, following = pieces[0], pieces[0].data_ptr()
    for piece in pieces:
        is_next = piece.data_ptr() == following and piece.dtype == first.dtype and piece.is_contiguous()
        in_one = piece.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (is_next and in_one and piece.shape[1:] == first.shape[1:]):
            return None
        following += piece.numel() * piece.element_size()
    return first.data.as_strided((sum(len(piece) for piece in pieces), *first.shape[1:]), first.stride()).data


def sums_by_index(index: torch.Tensor, rows: torch.Tensor, *, at_most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(where, what) to add: rows [T, h] summed by `index` int64 [T] below `at_most`, as many pairs as there were.

    Each sum has one place, the rest are zeros for places anywhere: nothing waits for the device to count. A token that
    fills half of a batch costs no more than others (a plain `index_put_`: 5.8 ms for 0.25, on an H100).
    """
    ordered, order = index.sort()
    rank = torch.cumsum(torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()]), 0)
    sums = torch.ops.aten.embedding_dense_backward(rows, torch.empty_like(index).scatter_(0, order, rank), len(index),
                                                   -1, False)  # fmt: skip
    into = torch.arange(len(index), device=index.device).remainder_(at_most).scatter_(0, rank, ordered)
    return into, sums


def add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, scale: float = 1.0, overwrite: bool = False
) -> None:
    """``total += scale · left @ right``, or ``=``: [m, n] in float32, factors of 16 bits or `total`'s dtype."""
    if left.is_cuda and left.dtype != total.dtype:  # cuBLAS adds in the wide dtype itself: no product in memory
        torch.addmm(total, left, right, beta=0 if overwrite else 1, alpha=scale, out_dtype=total.dtype, out=total)
    elif overwrite:
        total.copy_(left @ right).mul_(scale)
    else:
        total.add_(left @ right, alpha=scale)


@torch.library.custom_op("foretune::add_weight_gradient", mutates_args=("total", "filled"))
def _add_weight_gradient(
    total: torch.Tensor, filled: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor
) -> None:
    """total [out, in] of `GradientSum` (+)= gradient [T, out]ᵀ hidden [T, in]. `filled` lies on the host: no wait."""
    GradientSum(total, filled).add_product(gradient.T, hidden)


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


@dataclass(frozen=True)
class SummedTogether:
    """Linear maps of one input whose weights, and whose sums, lie side by side: one matrix for one product.

    Attributes:
        weight: [Σ out, in], without a gradient of its own.
        total: fp32, of the same shape.
        filled: bool [maps], as in `GradientSum`.
    """

    weight: torch.Tensor
    total: torch.Tensor
    filled: torch.Tensor

    @classmethod
    def of(cls, maps: Sequence[SummedLinear]) -> SummedTogether | None:
        """None where they lie apart."""
        weight = side_by_side([one.weight for one in maps])
        total = side_by_side([one.gradient_total for one in maps])
        filled = side_by_side([one.gradient_filled.view(1) for one in maps])
        return None if weight is None or total is None or filled is None else cls(weight, total, filled)

    def __call__(self, hidden: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """hidden [..., in] and bias [Σ out] → [..., Σ out]."""
        output: torch.Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            hidden, self.weight, bias, self.total, self.filled
        )
        return output


class _Lookup(torch.autograd.Function):
    """Rows of an embedding. The weight gets no gradient from autograd."""

    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, weight: torch.Tensor, into: GradientSum, unused: int | None
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.into, ctx.unused = into, unused
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        if ctx.unused is not None:
            gradient = gradient.masked_fill((ids == ctx.unused).unsqueeze(-1), 0.0)
        ctx.into.add_rows(ids.reshape(-1), gradient.reshape(-1, gradient.shape[-1]))
        return None, None, None, None


class SummedEmbedding(torch.nn.Embedding):
    """An embedding that adds its weight's gradients to `gradient_sum` itself."""

    gradient_sum: GradientSum

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [...] → [..., h]."""
        if not torch.is_grad_enabled():
            return F.embedding(ids, self.weight)
        rows: torch.Tensor = _Lookup.apply(  # type: ignore[no-untyped-call]
            ids, self.weight, self.gradient_sum, self.padding_idx
        )
        return rows


def sum_inside(model: Any, sums: Mapping[torch.nn.Parameter, GradientSum]) -> int:
    """Let the modules of a transformers model add to `sums` where they make their weights' gradients.

    To be called after the engine took the model, and after `attach_loss`. Left alone: weights that several layers share
    (their gradients are summed before), modules with a forward of their own, and whatever else has weights.

    Returns:
        How many linear maps inside the decoder layers.
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
    _sum_at_the_ends(model, sums)
    return count


def _sum_at_the_ends(model: Any, sums: Mapping[torch.nn.Parameter, GradientSum]) -> None:
    """The embedding and the output head, which may share one weight: each adds to its sum by itself.

    The head does so in `foretune.model.loss`, which reads the attribute.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_plain = type(table) is torch.nn.Embedding and "forward" not in vars(table)
    if is_plain and table.weight in sums and table.max_norm is None and not (table.sparse or table.scale_grad_by_freq):
        table.__class__ = SummedEmbedding
        table.gradient_sum = sums[table.weight]
    if type(head) is torch.nn.Linear and head.weight in sums:
        head.gradient_sum = sums[head.weight]  # type: ignore[index,assignment]
