"""Runs a script of this folder as a group of one: a process group and DeepSpeed's patches are for one process alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ResultOf = Callable[..., Any]


@pytest.fixture(scope="session")
def result_of(start_ranks: Callable[..., str]) -> ResultOf:
    """A function: name of a script, its arguments → what it printed as ``RESULT{json}``."""

    def run(script: str, *arguments: object) -> Any:
        printed = start_ranks(1, Path(__file__).parent / script, *arguments)
        line = next(line for line in printed.splitlines() if line.startswith("RESULT"))
        return json.loads(line.removeprefix("RESULT"))

    return run
