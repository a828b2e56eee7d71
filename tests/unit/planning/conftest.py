"""Configurations and prepared sets that the tests of the planner share, as functions that make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from foretune.artifacts import PreparedDataset
from foretune.config import Config, parse_config


@pytest.fixture(scope="session")
def config_of() -> Callable[..., Config]:
    """A configuration with its two required keys and whatever is given."""
    return lambda **values: parse_config({"model": "m", "data": "d.jsonl", **values})


@pytest.fixture(scope="session")
def prepared_of() -> Callable[..., PreparedDataset]:
    """A prepared set like GSM8K at 1024: 7,400 short documents in 1,450 packs."""
    facts: dict[str, Any] = {
        "fingerprint": "f",
        "fingerprint_parts": {},
        "max_length": 1024,
        "max_length_reason": "nearly all documents fit",
        "vocab_size": 49152,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "chat_template": "tokenizer",
        "sources": [],
        "rows_read": 7473,
        "documents": 7400,
        "validation_documents": 73,
        "dropped": {},
        "duplicates": 0,
        "truncated_documents": 0,
        "truncated_tokens": 0,
        "split_documents": 0,
        "tokens": 1_450_000,
        "target_tokens": 900_000,
        "validation_tokens": 15_000,
        "validation_target_tokens": 9_000,
        "packs": 1450,
        "fill": 0.976,
        "longest_document": 700,
        "samples": [],
        "notes": [],
        "seconds": 1.0,
    }
    return lambda **values: PreparedDataset.model_validate({**facts, **values})
