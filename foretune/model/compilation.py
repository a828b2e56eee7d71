"""Decoder layers compiled one by one, in training only.

    layer(hidden, …) ──training, gradients on──▶ compiled (recomputed in backward where checkpointed)
                     └──otherwise──────────────▶ as it was: probes, evaluation and generation have other shapes

All layers of a class share one compiled function, so a model costs the compilation of one layer. What was compiled is
kept on disk by torch, in a folder of ours, and found again by the next start. What it fuses (measured where the time of
a micro-step goes: docs/speed.md): norms, rotary embeddings, SwiGLU, residual sums, dtype casts.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.utils.checkpoint

from foretune.model.layers import decoder_layers

CACHE = Path.home() / ".cache" / "foretune" / "compiled"


def refusal(device: torch.device) -> str | None:
    """Why layers cannot be compiled on this machine; None if they can."""
    if device.type != "cuda":
        return "compiling pays on a GPU only"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name):
        return "there is no C compiler, which triton needs"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python's header files are not installed, which triton needs"
    return None


def compile_layers(
    model: Any, *, recompute_pointwise: bool = False, backend: str = "inductor", cache: Path = CACHE
) -> int:
    """Compile the decoder layers of a transformers model, adapted or not, whose parameters are whole (not ZeRO-3).

    To be called after the engine took the model, and after `loading.checkpoint_layers`: what that asked for is kept.

    Args:
        recompute_pointwise: keep nothing that a fused kernel can make again from what is kept: what the norms give to
            the linear maps, and gated products. A third less is kept, for one more write each in backward.
        cache: folder in which torch keeps compiled code from one start to the next.

    Returns:
        How many layers; 0 for a family without decoder layers that transformers can name.
    """
    # torch reads where its cache is from here alone; a user's own choice is kept.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    _keep_products(not recompute_pointwise)
    layers = decoder_layers(model)
    compiled: dict[type, Callable[..., Any]] = {}
    for layer in layers:
        plain = _plain_forward(type(layer))
        if type(layer) not in compiled:
            compiled[type(layer)] = torch.compile(plain, backend=backend)
        layer.forward = MethodType(
            _dispatch(plain, compiled[type(layer)], recompute=layer.gradient_checkpointing), layer
        )
        layer.gradient_checkpointing = False  # the dispatch does it, outside the compiled code
    return len(layers)


def _keep_products(keep: bool) -> None:
    """Of the whole process: torch cuts a layer's graph in two at its first call.

    What a matrix product reads in backward it keeps by default, even where a kernel that runs there anyway could write
    it.
    """
    if functorch_config.ban_recompute_materialized_backward != keep:
        functorch_config.ban_recompute_materialized_backward = keep
        torch._dynamo.reset()  # graphs that are there were cut the other way


def compiled_graphs() -> int:
    """How many graphs torch has compiled in this process. A number that grows after the first steps is lost time."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _plain_forward(layer_class: type) -> Callable[..., Any]:
    """The forward that the family wrote: transformers wraps it where it recomputes layers."""
    forward: Callable[..., Any] = layer_class.forward  # type: ignore[attr-defined]
    is_wrapped = forward.__code__.co_name == "forward_with_checkpointing"
    return forward.__wrapped__ if is_wrapped else forward  # type: ignore[attr-defined]


def _dispatch(plain: Callable[..., Any], compiled: Callable[..., Any], *, recompute: bool) -> Callable[..., Any]:
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return plain(self, *args, **kwargs)
        if recompute:
            return torch.utils.checkpoint.checkpoint(partial(compiled, self, **kwargs), *args, use_reentrant=False)
        return compiled(self, *args, **kwargs)

    return forward
