"""QuACK (Dao-AILab, `quack-kernels`), where it is installed: products with SwiGLU inside, a softmax that reads once.

It comes with the extra that brings FlashAttention-4 (`pip install foretune[flash]`), which is built on it. On an H100,
16,384 rows of the MLP of Qwen2.5-1.5B: gate, up and SwiGLU in 1.26 ms where cuBLAS and a fused kernel take 1.59; their
gradients and the product again in 0.97 ms instead of 1.26. Compiling its kernels makes the first step of a machine 50 s
longer; they are kept on disk.

Its configurations are ours, measured: its own search tries each of them on the device for 40 s a product. Names and
compilers change between versions: one pair is known, and no other is used.
"""

from __future__ import annotations

import logging
import os
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

#: Where compiled kernels are kept between starts.
CACHE = Path.home() / ".cache" / "foretune" / "quack"
#: The versions that were compared with torch's kernels: 0.6.5 cannot trace what a compiler of 4.8 calls.
VERSIONS = {"quack-kernels": "0.6.5", "nvidia-cutlass-dsl": "4.7.1"}
#: A row of a 16-bit matrix starts at a multiple of 16 bytes, or the copy engine cannot take it.
ALIGNMENT = 8


def keep_compiled() -> None:
    """Say where compiled kernels are kept. It is read when quack is imported; a user's own choice stays."""
    os.environ.setdefault("QUACK_CACHE_DIR", str(CACHE))


def takes(tensor: torch.Tensor) -> bool:
    """Whether it computes this [.., n]: installed, Hopper, bfloat16, rows that the copy engine can take."""
    known = tensor.is_cuda and tensor.dtype == torch.bfloat16 and tensor.shape[-1] % ALIGNMENT == 0
    return known and refusal(tensor.device) is None


def refusal(device: torch.device) -> str | None:
    """Why it cannot be used on this device; None if it can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "QuACK's kernels are used on Hopper GPUs only"
    return None if _kernels() is not None else f"{_named(VERSIONS)} cannot be used here"


def gated(hidden: torch.Tensor, joined: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`foretune.model.gated_mlp.gated_product`, on a device that it `takes`."""
    before, product = _kernels().gemm_gated(hidden, joined.T, activation="swiglu", concat_layout=("B",), tuned=False)
    return before, product


def gated_backward(
    gradient: torch.Tensor, down: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of before [T, 2 i], silu(gate) ⊙ up [T, i]) of the output's gradient [T, h] and down [h, i]."""
    kernels = _kernels()
    d_before, product = kernels.gemm_dgated(gradient, down, before, activation="swiglu", config=kernels.narrow)
    return d_before, product


def hidden_gradient(d_before: torch.Tensor, joined: torch.Tensor) -> torch.Tensor:
    """[T, h] of d_before [T, 2 i], interleaved, and [gate; up] [2 i, h]."""
    result = d_before.new_empty(d_before.shape[0], joined.shape[1])
    _product(d_before, joined, result, ("B",))
    return result


def add_joined_gradient(total: torch.Tensor, d_before: torch.Tensor, hidden: torch.Tensor, *, overwrite: bool) -> None:
    """float32 total [2 i, h] of [gate; up] (+)= d_before [T, 2 i]ᵀ hidden [T, h]."""
    _product(d_before.T, hidden, total, ("out",), add=not overwrite)


def _product(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, halves: tuple[str, ...], *, add: bool = False
) -> None:
    """out (+)= left @ right, where those of `halves` are [gate; up] and the others g₀ u₀ g₁ u₁ …

    By its function before the search for a configuration: the one in front of it looks for a library of heuristics at
    every call, which costs 0.2 ms where there is none.
    """
    kernels = _kernels()
    kernels.gemm_tuned.fn(
        left, right, out, config=kernels.wide, add_to_output=add, dynamic_scheduler=True, concat_layout=halves
    )


def softmax_in_place(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ nll, its gradient) of logits [c, V] with targets int64 [c]; the gradient lies where the logits were."""
    nll = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _kernels().cross_entropy_fwd_out(logits, target, None, nll, None, logits, None)
    return nll.sum(), logits


@cache
def _kernels() -> Any:
    """The functions; None where they are not installed, are other versions or can't be imported."""
    try:
        versions = {name: metadata.version(name) for name in VERSIONS}
    except metadata.PackageNotFoundError:
        return None
    if versions != VERSIONS:
        warnings.warn(f"{_named(versions)} is not used: {_named(VERSIONS)} is known", stacklevel=2)
        return None
    keep_compiled()
    try:
        from quack import gemm_config, gemm_interface
        from quack.cross_entropy import cross_entropy_fwd_out
    except Exception as error:
        warnings.warn(f"quack-kernels is installed but can't be imported ({error}): it is not used", stacklevel=2)
        return None
    # It takes a fingerprint of all that its epilogues reach, among it a logger that the compiler has once it has run.
    logging.Logger.__quack_semantic_key__ = lambda logger: logger.name  # type: ignore[attr-defined]
    return SimpleNamespace(
        gemm_tuned=gemm_interface.gemm_tuned,
        gemm_gated=gemm_interface.gemm_gated,
        gemm_dgated=gemm_interface.gemm_dgated,
        cross_entropy_fwd_out=cross_entropy_fwd_out,
        wide=gemm_config.GemmConfig(
            tile_m=128, tile_n=192, pingpong=True, cluster_m=2, cluster_n=1, is_dynamic_persistent=False
        ),
        # SwiGLU's gradient takes narrower tiles: 0.97 ms, where 128 x 192 takes 1.06.
        narrow=gemm_config.GemmConfig(
            tile_m=128, tile_n=128, pingpong=True, cluster_m=1, cluster_n=2, is_dynamic_persistent=False
        ),
    )


def _named(versions: dict[str, str]) -> str:
    return " with ".join(f"{name} {version}" for name, version in versions.items())
