"""What stands beside the weights: configuration, tokenizer with its template, generation settings.

base model's config.json ──dtype, architectures──▶ config.json
RUN/data/tokenizer/      ──as it is──────────────▶ tokenizer files, chat template
base generation_config   ──every end-of-turn id──▶ generation_config.json
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from foretune.artifacts import PreparedDataset
from foretune.data.chat_template import load_tokenizer, stop_token_ids

GENERATION_CONFIG = "generation_config.json"


def write_config(config: Any, folder: Path, *, architecture: str, dtype: torch.dtype, base: Path) -> None:
    """Write ``config.json``: the base model's own, with the dtype of the weights beside it.

    A model that brings its own code needs that code to load: its Python files come along.
    """
    config.architectures = [architecture]
    config.dtype = dtype
    config.save_pretrained(str(folder))
    if getattr(config, "auto_map", None):
        for file in base.glob("*.py"):
            shutil.copy2(file, folder / file.name)


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Copy the tokenizer that prepared the training data, its chat template included."""
    for file in sorted(tokenizer.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            shutil.copy2(file, folder / file.name)


def write_generation_config(
    folder: Path, *, base: Path, prepared: PreparedDataset, trust_remote_code: bool = False
) -> list[int]:
    """Write ``generation_config.json``: the base model's, which also stops where training taught it to stop.

    Returns:
        The end-of-sequence ids: the base's, the tokenizer's, and the token that ends an assistant turn of the template.
    """
    values = _base_generation(base)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    known = values.get("eos_token_id")
    ends = [*(known if isinstance(known, list) else [known]), prepared.eos_token_id, *stop_token_ids(tokenizer)]
    eos = list(dict.fromkeys(int(end) for end in ends if end is not None))
    values["eos_token_id"] = eos if len(eos) > 1 else eos[0]
    values.setdefault("bos_token_id", tokenizer.bos_token_id)
    if values.get("pad_token_id") is None:
        values["pad_token_id"] = prepared.pad_token_id
    text = json.dumps({key: value for key, value in values.items() if value is not None}, indent=2) + "\n"
    (folder / GENERATION_CONFIG).write_text(text, encoding="utf-8")
    return eos


def _base_generation(base: Path) -> dict[str, Any]:
    """The base model's generation settings; those in its ``config.json`` where it has no file of its own."""
    file = base / GENERATION_CONFIG
    if file.is_file():
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for key in ("transformers_version", "_from_model_config"):  # the latter lets transformers overwrite the rest
            values.pop(key, None)
        return values
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
