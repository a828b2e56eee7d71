"""Cheap looks at a model folder before anything slow starts: are its weights whole, does it bring code of its own?

Ranks would find both too, half a minute later and each on its own. No torch, no transformers.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from foretune.errors import UserError

#: A safetensors header is below 100 MB by the format's own rule; a larger number is no header.
_HEADER_BYTES = 100_000_000


def look_at_model(folder: Path, *, trust_remote_code: bool, weights: bool = True) -> None:
    """Refuse what can't work.

    Args:
        trust_remote_code: whether the user allowed Python code that comes with the model.
        weights: whether the folder's weights are going to be read.

    Raises:
        UserError: (field ``trust_remote_code``) the model needs its own code; (field ``model``) a weight file is torn.
    """
    if not trust_remote_code:
        _refuse_own_code(folder)
    if weights:
        for file in sorted(folder.glob("*.safetensors")):
            _refuse_torn(folder, file)


def _refuse_own_code(folder: Path) -> None:
    """transformers would ask on the terminal, or fail late. What it knows itself it runs without the model's code."""
    values = _json(folder / "config.json")
    kind = values.get("model_type")
    if not values.get("auto_map") or (isinstance(kind, str) and _is_known(kind)):
        return
    raise UserError(
        "trust_remote_code",
        False,
        f"the model in {folder} brings its own Python code, which would run on this machine",
        f"read the .py files in {folder}; if you trust them, add --trust-remote-code",
    )


def _is_known(model_type: str) -> bool:
    """Whether the installed transformers has this type of model, told from its folders (an import takes a second)."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return True
    return (Path(found.origin).parent / "models" / model_type.replace("-", "_")).is_dir()


def _refuse_torn(folder: Path, file: Path) -> None:
    """A safetensors file says in its header how long it is: 8 bytes of length, JSON with offsets, data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", (stream.read(8) + bytes(8))[:8])
        header: Any = None
        if 2 <= length <= min(size - 8, _HEADER_BYTES):
            with suppress(ValueError):
                header = json.loads(stream.read(length))
    if isinstance(header, dict):
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if 8 + length + max(ends, default=0) == size:
            return
    raise UserError(
        "model",
        str(folder),
        f"its weight file {file.name} is torn or no safetensors file ({size:,} bytes)",
        "download or copy that file again",
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # told by whoever needs it
        return {}
    return values if isinstance(values, dict) else {}
