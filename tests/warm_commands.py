"""Runs foretune's command lines as forks of one process that has imported everything.

    WarmCommands.run(words) ──one line of JSON──▶ this file as a process ──fork──▶ `foretune.__main__.main(words)`
                            ◀──the exit code─────

To import torch, transformers and 🤗 datasets takes a command 6 s of a core, to fork none. Each command is a process of
its own, with its own folder and output. Some things only a fresh process shows: what imports cost, print or forbid;
what libraries read from the environment as they are imported (`HF_HOME`: here a temporary folder's, for all commands);
threads that would keep Python from ending, and children that hold the output open. So every file that uses this runs
some commands fresh.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from forks import end_after

from foretune.distributed import die_with_parent

IMPORTED = (
    "datasets", "peft", "safetensors.torch", "transformers.models.llama.modeling_llama",
    "transformers.integrations.peft", "foretune.cli", "foretune.__main__", "foretune.pipeline.road",
    "foretune.pipeline.verbs", "foretune.data.prepare", "foretune.evaluation.evaluate", "foretune.exporting.export",
    "foretune.reporting.live", "foretune.serving.server",
)  # fmt: skip


class WarmCommands:
    """What tests call. Use as a context; commands run one at a time."""

    def __enter__(self) -> WarmCommands:
        self._home = TemporaryDirectory()
        environment = {**os.environ, "HOME": self._home.name, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment = {name: value for name, value in environment.items() if name not in ("HF_HOME", "HF_HUB_CACHE")}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.kill()  # and with it a command that still runs
        self._process.communicate()
        self._home.cleanup()

    def run(
        self, words: Sequence[str], *, environment: Mapping[str, str], timeout: float, folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """What ``python -m foretune WORDS`` does; killed after `timeout` seconds, which is exit code -9.

        Raises:
            RuntimeError: the process behind it has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with TemporaryDirectory() as name:
            output, errors = Path(name) / "stdout", Path(name) / "stderr"
            order = {
                "words": list(words), "folder": str(folder or Path.cwd()), "environment": dict(environment),
                "stdout": str(output), "stderr": str(errors), "timeout": timeout,
            }  # fmt: skip
            answer = ""
            try:
                self._process.stdin.write(json.dumps(order) + "\n")
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
            except BrokenPipeError:
                pass
            finally:
                if not answer:  # or it was interrupted: a later command must not get this one's answer
                    self._process.kill()
            if not answer:
                raise RuntimeError(f"the process that forks commands has ended ({' '.join(words)})")
            return subprocess.CompletedProcess(list(words), int(answer), output.read_text(), errors.read_text())


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print as they are imported is no answer
    for name in IMPORTED:
        import_module(name)
    sys.stdout.flush()  # forks would each print it again
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            end_after(partial(_run, order))
        end = time.monotonic() + order["timeout"]
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            time.sleep(0.01)
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                end = float("inf")
        print(os.waitstatus_to_exitcode(ended[1]), file=answers, flush=True)


def _run(order: dict[str, Any]) -> int:
    """In the child: become that command. Its exit code."""
    from foretune.__main__ import main

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
    return code


if __name__ == "__main__":
    _serve()
