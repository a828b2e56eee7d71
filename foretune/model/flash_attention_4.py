"""FlashAttention-4 (Dao-AILab, `flash-attn-4`), where it is installed: packed attention for Hopper and Blackwell.

An extra (`pip install foretune[flash]`), since it brings a compiler of half a gigabyte. On an H100, forward and
backward, 4 rows of 4096, 12 heads of 128: over documents of 700 tokens on average 0.73 ms where torch's flash kernels
take 1.33; of one length, 1.40 ms where cuDNN's take 1.55. Importing it takes 8 s and compiling a shape 5 to 7 s; what
was compiled is kept on disk.

Its functions for one direction have no public name and change: one version is known, and no other is used.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from foretune.model import quack_kernels

#: Where compiled kernels are kept between starts.
CACHE = Path.home() / ".cache" / "foretune" / "flash-attention-4"
#: The version that was compared with torch's kernels.
VERSION = "4.0.0b36"
#: Head sizes that were compared, on a GPU of capability 9; those of 10 it is made for too, and they were not tried.
_HEADS, _DEVICES = (64, 128), (9, 10)


def is_there(device: torch.device) -> bool:
    """Whether it can be used on this device: Hopper or data-centre Blackwell, installed. It is imported then."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in _DEVICES and _kernels() is not None


def takes(query: torch.Tensor) -> bool:
    """Whether it computes this query [T, heads, d]: a known head size, and it is there."""
    return query.shape[-1] in _HEADS and is_there(query.device)


def forward(  # noqa: PLR0917 (as the operator has them)
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float | None,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, heads, d] and log-sum-exp fp32 [heads, T]; arguments as in `foretune.model.attention`."""
    output, log_normalizer, *_ = _kernels()._flash_attn_fwd(
        query, key, value, return_lse=True, **_options(query, bounds, longest, scale, window)
    )
    return output, log_normalizer


def backward(  # noqa: PLR0917 (as the operator has them)
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_normalizer: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float | None,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value. Where determinism is asked for, in one order: a quarter more time."""
    d_query, d_key, d_value = _kernels()._flash_attn_bwd(
        query, key, value, output, gradient.contiguous(), log_normalizer,
        deterministic=torch.are_deterministic_algorithms_enabled(), **_options(query, bounds, longest, scale, window),
    )  # fmt: skip
    return d_query, d_key, d_value


def _options(
    query: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float | None, window: int
) -> dict[str, Any]:
    return {
        "softmax_scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "causal": True,
        "window_size_left": None if window < 0 else window,
        "cu_seqlens_q": bounds,
        "cu_seqlens_k": bounds,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


@cache
def _kernels() -> Any:
    """The module with the functions; None where it is not installed, is another version or can't be imported."""
    try:
        version = metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return None
    if version != VERSION:
        warnings.warn(f"flash-attn-4 {version} is not used: {VERSION} is known", stacklevel=2)
        return None
    # Read when it is imported; a user's own choice is kept.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(CACHE))
    quack_kernels.keep_compiled()  # it is built on QuACK, and imports it
    warnings.filterwarnings("ignore", message="Argument aux_data")  # of its compiler, about its own parts
    try:
        from flash_attn.cute import interface
    except Exception as error:
        warnings.warn(f"flash-attn-4 is installed but can't be imported ({error}): it is not used", stacklevel=2)
        return None
    return interface
