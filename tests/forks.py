"""Work in forks of one process that has imported everything.

To import torch, transformers and DeepSpeed takes 5 to 10 s of a core, to fork none.

    WarmProcess.run(work) ──one line of JSON──▶ a file as a process: `serve(do, load)` ──fork──▶ do(work)
                          ◀──the exit code─────

Each fork is a process of its own, with its own folder, environment and output. Some things only a fresh process shows:
what imports cost, print or forbid; what libraries read from the environment as they are imported; threads that would
keep Python from ending, and children that hold the output open.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from foretune.distributed import die_with_parent


class WarmProcess:
    """The tests' side: starts `file`, which is to `serve`, with `environment`. A context; works one order at a time."""

    def __init__(self, file: str, environment: Mapping[str, str]) -> None:
        self._command, self._environment = [sys.executable, file], dict(environment)

    def __enter__(self) -> WarmProcess:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.kill()  # and with it what still runs
        self._process.communicate()

    def run(
        self, work: Any, *, environment: Mapping[str, str], timeout: float, folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The exit code and the output of `work` (JSON); killed after `timeout` seconds, which is exit code -9.

        Raises:
            RuntimeError: the process behind it has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with TemporaryDirectory() as name:
            output, errors = Path(name) / "stdout", Path(name) / "stderr"
            order = {
                "work": work, "folder": str(folder or Path.cwd()), "environment": dict(environment),
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
                if not answer:  # or it was interrupted: later work must not get this one's answer
                    self._process.kill()
            if not answer:
                raise RuntimeError(f"the process that was to fork for {work} has ended")
            return subprocess.CompletedProcess([], int(answer), output.read_text(), errors.read_text())


def serve(do: Callable[[Any], object], load: Callable[[], None]) -> None:
    """The other side: `load`, then a fork that does each order's work."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print as they are imported is no answer
    load()
    sys.stdout.flush()  # forks would each print it again
    gc.collect()
    gc.freeze()  # the collector would otherwise write to, and so copy, every inherited page
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            end_after(partial(_become, order, do))
        end = time.monotonic() + order["timeout"]
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            time.sleep(0.01)
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                end = float("inf")
        print(os.waitstatus_to_exitcode(ended[1]), file=answers, flush=True)


def _become(order: dict[str, Any], do: Callable[[Any], object]) -> object:
    die_with_parent()
    for number, name in enumerate((os.devnull, order["stdout"], order["stderr"])):
        descriptor = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    return do(order["work"])


def end_after(work: Callable[[], object]) -> NoReturn:
    """Do it and leave: with the code it returns (None: 0) or exits with; 1 after an exception, which is printed."""
    code = 1
    try:
        result = work()
        code = result if isinstance(result, int) else 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
