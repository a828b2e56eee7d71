"""Runs foretune's command lines, each in a fork of one process that has imported everything (`forks`).

A command takes 6 s of a core less. Every file that uses this runs some commands in fresh processes too.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from forks import WarmProcess, serve

IMPORTED = (
    "datasets", "peft", "safetensors.torch", "transformers.models.llama.modeling_llama",
    "transformers.integrations.peft", "foretune.cli", "foretune.__main__", "foretune.pipeline.road",
    "foretune.pipeline.verbs", "foretune.data.prepare", "foretune.evaluation.evaluate", "foretune.exporting.export",
    "foretune.reporting.live", "foretune.serving.server",
)  # fmt: skip


class RunCommand(Protocol):
    def __call__(
        self, words: Sequence[str], *, environment: Mapping[str, str], timeout: float, folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]: ...


@contextmanager
def warm_commands() -> Iterator[RunCommand]:
    """A function that does what ``python -m foretune WORDS`` does. The hub's cache is a temporary folder's, for all."""
    with TemporaryDirectory() as home:
        environment = {**os.environ, "HOME": home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        for name in ("HF_HOME", "HF_HUB_CACHE"):
            environment.pop(name, None)
        with WarmProcess(__file__, environment) as process:
            yield process.run


def _load() -> None:
    for name in IMPORTED:
        import_module(name)


def _command(words: list[str]) -> int:
    from foretune.__main__ import main

    sys.argv = ["foretune", *words]
    code = main()
    atexit._run_exitfuncs()
    return code


if __name__ == "__main__":
    serve(_command, _load)
