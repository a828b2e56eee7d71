"""Tensors, one after the other, become safetensors shards; and are read back from them.

    (name, tensor) ──cast──▶ shard (in memory, at most `max_shard_bytes`) ──full──▶ model-0000K-of-0000N.safetensors
                        └─▶ sha256 of its bytes, compared with what the file gives back

Host memory: one shard. The files and their index are what transformers writes itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from foretune.errors import VerificationFailed

#: Bounds host memory while a model of any size is written.
MAX_SHARD_BYTES = 2_000_000_000


@dataclass
class WrittenWeights:
    """What was written.

    Attributes:
        parameters: elements of all tensors; tied ones counted once.
        digests: sha256 of each tensor's bytes by name, as it was before writing.
        files: shard by tensor name.
    """

    parameters: int = 0
    total_bytes: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def write_weights(
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    *,
    dtype: torch.dtype | None,
    stem: str = "model",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> WrittenWeights:
    """Write tensors as ``STEM.safetensors``, or as shards and ``STEM.safetensors.index.json``.

    Args:
        tensors: names and values; a name comes once. Values are cast if they are floating-point.
        folder: exists.
        dtype: to cast to; None keeps each tensor's own.
        max_shard_bytes: a shard is closed before it would grow beyond this (one larger tensor is a shard of its own).

    Raises:
        VerificationFailed: a tensor is empty or holds NaN or infinity.
    """
    written = WrittenWeights()
    shards: list[dict[str, torch.Tensor]] = [{}]
    names: list[list[str]] = []
    size = 0
    for name, tensor in tensors:
        kept = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        _refuse_broken(name, kept)
        if size and size + kept.nbytes > max_shard_bytes:
            names.append(_save_shard(shards.pop(), folder, stem, len(names)))
            shards.append({})
            size = 0
        assert name not in written.digests, f"{name} comes twice"
        shards[0][name] = kept
        size += kept.nbytes
        written.parameters += kept.numel()
        written.total_bytes += kept.nbytes
        written.digests[name] = digest(kept)
    names.append(_save_shard(shards.pop(), folder, stem, len(names)))
    _name_shards(names, folder, stem, written)
    return written


def check_weights(folder: Path, written: WrittenWeights) -> None:
    """Read every shard back: the same names, and the same bytes. Raises `VerificationFailed`."""
    from safetensors import safe_open

    seen = set()
    for file_name in sorted(set(written.files.values())):
        with safe_open(folder / file_name, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                seen.add(name)
                found = digest(file.get_tensor(name))
                if found != written.digests.get(name):
                    raise VerificationFailed(f"{file_name}: tensor {name} reads back differently from what was written")
    if seen != set(written.digests):
        odd = sorted(seen ^ set(written.digests))[0]
        raise VerificationFailed(f"{folder.name}: tensor {odd} was lost or added while writing")


def digest(tensor: torch.Tensor) -> str:
    """sha256 of a contiguous CPU tensor's dtype, shape and bytes."""
    described = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    described.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return described.hexdigest()


def _refuse_broken(name: str, tensor: torch.Tensor) -> None:
    if tensor.numel() == 0:
        raise VerificationFailed(f"tensor {name} is empty (shape {tuple(tensor.shape)})")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise VerificationFailed(f"tensor {name} holds {count} values that are NaN or infinite")


def _save_shard(shard: Mapping[str, torch.Tensor], folder: Path, stem: str, number: int) -> list[str]:
    from safetensors.torch import save_file

    # "format": transformers asks for it.
    save_file(dict(shard), folder / _unfinished(stem, number), metadata={"format": "pt"})
    return list(shard)


def _unfinished(stem: str, number: int) -> str:
    return f"{stem}.shard-{number:05d}"


def _name_shards(names: list[list[str]], folder: Path, stem: str, written: WrittenWeights) -> None:
    """Give the shards their final names, which say how many there are, and write the index."""
    for number, members in enumerate(names):
        one = len(names) == 1
        file_name = f"{stem}.safetensors" if one else f"{stem}-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / _unfinished(stem, number)).rename(folder / file_name)
        written.files.update(dict.fromkeys(members, file_name))
    if len(names) > 1:
        index = {"metadata": {"total_size": written.total_bytes}, "weight_map": written.files}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
