"""Query, key and value of a layer by one product, for any family whose attention takes them from one input.

    q, k, v = split(x [Wq; Wk; Wv]ᵀ + b)         backward:  gx = [gq gk gv] [Wq; Wk; Wv]     one product each, and one
                                                             for the sum of the three weights' gradients

Key and value are narrow where heads share them: 256 columns of 16,384 rows leave most of an H100 idle, and each of
three products reads x again, or adds its part of gx to the others' in a pass of its own.

The family's own code computes on from there. It runs in a twin of the attention module, which is given the product in
place of x; the twin's maps only take their columns of it. So it must read x in these maps and for its shape alone,
which its source is asked for. The weights are read as one matrix, as they lie in the flat buffers of ZeRO-1
(`foretune.model.weight_sums`). It pays where a compiler fuses the columns into what reads them.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from types import MethodType
from typing import Any

import torch

from foretune.model.layers import decoder_layers
from foretune.model.weight_sums import SummedLinear, SummedTogether

#: Under the names that families give them.
MAPS = ("q_proj", "k_proj", "v_proj")


class _Columns(torch.nn.Module):
    """Takes its columns of a product of several maps."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__()
        self.start, self.end = start, end

    def forward(self, product: torch.Tensor) -> torch.Tensor:
        """[..., Σ out] → [..., out], apart: kept for backward as a view, it would keep the others too."""
        return product[..., self.start : self.end].contiguous()


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
            module.twin = (_twin(module, maps),)  # in a tuple, or its parameters would be the model's a second time
            module.forward = MethodType(_forward, module)
            count += 1
    return count


def _has_maps(module: Any) -> bool:
    return "forward" not in vars(module) and all(type(getattr(module, name, None)) is SummedLinear for name in MAPS)


def _twin(module: Any, maps: list[SummedLinear]) -> Any:
    """Its parts are the module's own, but for the maps."""
    twin, start = copy.copy(module), 0
    twin.training = True
    twin._modules = dict(module._modules)
    for name, one in zip(MAPS, maps, strict=True):
        setattr(twin, name, _Columns(start, start + one.out_features))
        start += one.out_features
    return twin


def _forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    plain = type(self).forward
    # An input without a gradient would leave autograd nothing to go back by: the joined weight has none of its own.
    if not (self.training and torch.is_grad_enabled() and hidden_states.requires_grad):
        return plain(self, hidden_states, *args, **kwargs)
    bias = None if self.q_proj.bias is None else torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
    return plain(self.twin[0], self.together(hidden_states, bias), *args, **kwargs)


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
