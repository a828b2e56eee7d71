"""Runs foretune's command lines as forks of one process that has imported everything.

    WarmCommands.run(words) ──one line of JSON──▶ this file as a process ──fork──▶ `foretune.__main__.main(words)`
                            ◀──the exit code─────

To import torch, transformers and 🤗 datasets takes a command 6 s of a core, to fork none. Each command is a process of
its own all the same, with its own folder, environment and output. What only a fresh process shows (what is imported
when, and without it) other tests look at.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from foretune.distributed import die_with_parent

IMPORTED = (
    "datasets", "peft", "safetensors.torch", "transformers.models.llama.modeling_llama",
    "transformers.integrations.peft", "foretune.cli", "foretune.__main__", "foretune.pipeline.road",
    "foretune.pipeline.verbs", "foretune.data.prepare", "foretune.evaluation.evaluate", "foretune.exporting.export",
    "foretune.reporting.live", "foretune.serving.server",
)  # fmt: skip


class WarmCommands:
    """The tests' end. Use as a context; commands run one at a time."""

    def __enter__(self) -> WarmCommands:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # read when they are imported
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.__exit__(*error)  # its input ends there, and so does it

    def run(
        self, words: Sequence[str], *, environment: Mapping[str, str], folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run([python, "-m", "foretune", *words], capture_output=True, text=True)`` would."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with TemporaryDirectory() as name:
            output, errors = Path(name) / "stdout", Path(name) / "stderr"
            order = {
                "words": list(words), "folder": str(folder or Path.cwd()), "environment": dict(environment),
                "stdout": str(output), "stderr": str(errors),
            }  # fmt: skip
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(list(words), code, output.read_text(), errors.read_text())


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print as they are imported is no answer
    for name in IMPORTED:
        import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(order)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _run(order: dict[str, Any]) -> None:
    """In the child: become that command, and never return."""
    from foretune.__main__ import main

    code = 1
    try:
        die_with_parent()
        for number, name in enumerate((os.devnull, order["stdout"], order["stderr"])):
            descriptor = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"])
        sys.argv = ["foretune", *order["words"]]
        code = main()
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
