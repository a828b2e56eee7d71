"""Runs a script of this folder in a process of its own: a process group and DeepSpeed's patches are for one alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ResultOf = Callable[..., Any]


@pytest.fixture(scope="session")
def result_of() -> ResultOf:
    """A function: name of a script, its arguments → what it printed as ``RESULT{json}``."""

    def run(script: str, *arguments: object) -> Any:
        command = [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
        return json.loads(line.removeprefix("RESULT"))

    return run
