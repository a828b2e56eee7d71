"""Decoder layers compiled one by one, in training only.

    layer(hidden, …) ──training, gradients on──▶ compiled
                     └──otherwise──────────────▶ as it was: probes, evaluation and generation have other shapes

All layers of a class share one compiled function, so a model costs the compilation of one layer, or of two where some
layers recompute. What was compiled is kept on disk by torch, in the folder that the launcher names
(TORCHINDUCTOR_CACHE_DIR), and found again by the next start.
What it fuses (measured where the time of a micro-step goes: docs/speed.md): norms, rotary embeddings, SwiGLU, residual
sums, dtype casts.

A layer that recomputes calls its compiled forward once more. Where it keeps attention's output it recomputes inside its
compiled backward, where the compiler sees what is needed: the MLP's last product, which only the layer's output is made
of, is not made again either. (torch 2.11 marks what to make again only where something is to be kept: without that it
kept products, 38 KB a token and layer of the 1.5B shape.)
"""

from __future__ import annotations

import hashlib
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
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from foretune.model.attention import OUTPUTS
from foretune.model.layers import decoder_layers
from foretune.model.tiling import has_tiles


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
    model: Any,
    *,
    recompute_pointwise: bool = False,
    keep_attention: bool = False,
    backend: str = "inductor",
) -> int:
    """Compile the decoder layers of a transformers model, adapted or not, whose parameters are whole (not ZeRO-3).

    To be called after the engine took the model, and after `loading.checkpoint_layers`: what that asked for is kept.

    Args:
        recompute_pointwise: keep nothing that a fused kernel can make again from what is kept: what the norms give to
            the linear maps, and gated products. A third less is kept, for one more write each in backward.
        keep_attention: layers that recompute keep what packed attention gave them, and do not compute it again.

    Returns:
        How many layers; 0 for a family without decoder layers that transformers can name.
    """
    _keep_traces()
    _keep_products(not recompute_pointwise)
    layers = decoder_layers(model)
    compiled: dict[tuple[type, bool], Callable[..., Any]] = {}
    for layer in layers:
        plain = _plain_forward(type(layer))
        recomputed = bool(layer.gradient_checkpointing)
        # Tiles of an MLP are not compiled: a graph that breaks there can't recompute itself.
        inside = recomputed and keep_attention and not has_tiles(layer)
        if (type(layer), inside) not in compiled:
            compiled[type(layer), inside] = torch.compile(
                partial(_recomputed, plain, kept=OUTPUTS) if inside else plain, backend=backend
            )
        run = compiled[type(layer), inside]
        if recomputed and not inside:
            run = partial(_recomputed, run, kept=())
        layer.forward = MethodType(_dispatch(plain, run), layer)
        layer.gradient_checkpointing = False
    return len(layers)


def _keep_traces() -> None:
    """Of the whole process: what autograd traced of a layer is kept on disk too, though it calls functions of our own.

    torch leaves such layers out unless it is told otherwise, since it can't know what a function depends on. Ours
    depend on their arguments and on the code of this folder, which becomes a part of the key.
    """
    functorch_config.autograd_cache_allow_custom_autograd_functions = True
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    torch.compiler.config.cache_key_tag = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "") + code.hexdigest()


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


def found_graphs() -> int:
    """Of the graphs that this process compiled, how many were found on disk, traced and compiled by an earlier one."""
    from torch._dynamo.utils import counters

    return int(counters["aot_autograd"]["autograd_cache_hit"])


def _plain_forward(layer_class: type) -> Callable[..., Any]:
    """The forward that the family wrote: transformers wraps it where it recomputes layers."""
    forward: Callable[..., Any] = layer_class.forward  # type: ignore[attr-defined]
    is_wrapped = forward.__code__.co_name == "forward_with_checkpointing"
    return forward.__wrapped__ if is_wrapped else forward  # type: ignore[attr-defined]


def _dispatch(plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        in_training = self.training and torch.is_grad_enabled()
        return (compiled if in_training else plain)(self, *args, **kwargs)

    return forward


def _recomputed(run: Callable[..., Any], *args: Any, kept: tuple[Any, ...], **kwargs: Any) -> Any:
    """What `run` returns; backward calls it again, but for the operators that are `kept`."""
    contexts: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, list(kept))} if kept else {}
    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False, **contexts, **kwargs)
