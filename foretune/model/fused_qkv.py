"""Query, key and value of a layer by one product, for any family whose attention takes them from one input.

    q, k, v = split(x [Wq; Wk; Wv]ᵀ + b)         backward:  gx = [gq gk gv] [Wq; Wk; Wv]     one product each, and one
                                                             for the sum of the three weights' gradients

Key and value are narrow where heads share them: 256 columns of 16,384 rows leave most of an H100 idle, and each of
three products reads x again, or adds its part of gx to the others' in a pass of its own.

The family's own code computes on from there. It runs in a twin of the attention module, which is given the product's
columns in place of x; the twin's maps only take theirs. So it must read x in these maps and for its shape alone, which
its source is asked for. The weights are read as one matrix, as they lie in the flat buffers of ZeRO-1
(`foretune.model.weight_sums`). It pays where a compiler fuses the columns into what reads them.

[gq gk gv] is an operator of its own. torch's compiler would compute it in one kernel, in which each element asks all
three for their part: 0.17 ms for 16,384 x 2,048 on an H200, and nothing was left of what one product saves.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from types import MethodType
from typing import Any, NamedTuple

import torch

from foretune.model.layers import decoder_layers
from foretune.model.weight_sums import SummedLinear, SummedTogether

#: Under the names that families give them.
MAPS = ("q_proj", "k_proj", "v_proj")


class _Columns(NamedTuple):
    """What a twin is given in place of its input: the shape of the product, and the columns [..., out] of each map."""

    shape: torch.Size
    q_proj: torch.Tensor
    k_proj: torch.Tensor
    v_proj: torch.Tensor


class _Take(torch.nn.Module):
    """A twin's map: takes what was computed for it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, columns: _Columns) -> torch.Tensor:
        """Its columns [..., out]."""
        taken: torch.Tensor = getattr(columns, self.name)
        return taken


@torch.library.custom_op("foretune::join_columns", mutates_args=())
def join_columns(pieces: list[torch.Tensor]) -> torch.Tensor:
    """[..., out] each → [..., Σ out]. See the head of this file."""
    return torch.cat(pieces, -1)


@join_columns.register_fake
def _(pieces: list[torch.Tensor]) -> torch.Tensor:
    return pieces[0].new_empty(*pieces[0].shape[:-1], sum(piece.shape[-1] for piece in pieces))


class _Split(torch.autograd.Function):
    """[..., Σ out] → [..., out] each, apart: kept for backward as a view, one would keep the others too."""

    @staticmethod
    def forward(ctx: Any, product: torch.Tensor, widths: list[int]) -> tuple[torch.Tensor, ...]:
        return tuple(piece.contiguous() for piece in torch.split(product, widths, -1))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.ops.foretune.join_columns(gradients), None


def fuse_qkv(model: Any) -> int:
    """Let the attention of a transformers model compute query, key and value by one product, in training.

    To be called after `weight_sums.sum_inside` and before layers are compiled. Left alone: modules that read their
    input for anything else, and weights whose sums are not their own or that lie apart.

    Returns:
        How many modules.
    """
    modules = [module for layer in decoder_layers(model) for module in layer.modules() if _has_maps(module)]
    allowed = {kind: _reads_input_in_maps_only(kind) for kind in {type(module) for module in modules}}
    count = 0
    for module in modules:
        maps = [getattr(module, name) for name in MAPS]
        together = SummedTogether.of(maps)
        biases = [one.bias for one in maps if one.bias is not None]
        if allowed[type(module)] and together is not None and len(biases) in {0, len(maps)}:
            module.together = together
            module.twin = (_twin(module),)  # in a tuple, or its parameters would be the model's a second time
            module.forward = MethodType(_forward, module)
            count += 1
    return count


def _has_maps(module: Any) -> bool:
    return "forward" not in vars(module) and all(type(getattr(module, name, None)) is SummedLinear for name in MAPS)


def _twin(module: Any) -> Any:
    """Its parts are the module's own, but for the maps."""
    twin = copy.copy(module)
    twin.training = True
    twin._modules = dict(module._modules)
    for name in MAPS:
        setattr(twin, name, _Take(name))
    return twin


def _forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    plain = type(self).forward
    # An input without a gradient would leave autograd nothing to go back by: the joined weight has none of its own.
    if not (self.training and torch.is_grad_enabled() and hidden_states.requires_grad):
        return plain(self, hidden_states, *args, **kwargs)
    maps = [self.q_proj, self.k_proj, self.v_proj]
    bias = None if self.q_proj.bias is None else torch.cat([one.bias for one in maps])
    product = self.together(hidden_states, bias)
    pieces = _Split.apply(product, [one.out_features for one in maps])  # type: ignore[no-untyped-call]
    return plain(self.twin[0], _Columns(product.shape, *pieces), *args, **kwargs)


def _reads_input_in_maps_only(kind: type) -> bool:
    """Whether the forward of an attention class is one that a twin can run.

    Its `hidden_states` stand nowhere but in `self.q_proj(hidden_states)`, the same of k and v, and in
    `hidden_states.shape[:-1]`; and the maps nowhere else, each once and whatever else is given.
    """
    function: Any = kind.forward  # type: ignore[attr-defined]
    if inspect.unwrap(function) is not function:  # what wraps it may read its arguments too
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # no source, or none that stands alone
        return False
    owner, given, *_ = inspect.signature(function).parameters
    reads = sum(isinstance(node, ast.Name) and node.id == given for node in ast.walk(tree))
    named = sum(isinstance(node, ast.Attribute) and node.attr in MAPS for node in ast.walk(tree))
    sources = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call | ast.Subscript)]
    conditions = [node for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp)]
    if any(isinstance(node, ast.Attribute) and node.attr in MAPS for one in conditions for node in ast.walk(one)):
        return False
    calls = [sources.count(f"{owner}.{name}({given})") for name in MAPS]
    shapes = sources.count(f"{given}.shape[:-1]")
    return given == "hidden_states" and calls == [1, 1, 1] and named == len(MAPS) and reads == len(MAPS) + shapes
