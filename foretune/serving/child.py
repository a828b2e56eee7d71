"""The processes below a server, so that nothing is left of it however it ends.

server ──pipe on stdin──▶ keeper ──own session, PR_SET_PDEATHSIG──▶ engine (and the engine's own processes)

``python -m foretune.serving.child keep FOLDER GRACE COMMAND…``   runs an engine; ends it when the pipe closes
``python -m foretune.serving.child transformers SOCKET MODEL``    `transformers serve` on a Unix socket

The kernel closes the pipe when the server dies, also by SIGKILL and also if it was started by a thread that is long
gone (PR_SET_PDEATHSIG alone fires when the starting *thread* ends). The keeper then asks the engine to end, kills what
is left after GRACE seconds, and removes the engine's private folder.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from foretune.distributed import die_with_parent

_POLL_SECONDS = 0.2


def keep(folder: Path, grace_seconds: float, command: list[str]) -> int:
    """Run `command` until it ends (returns its exit status) or until stdin closes (ends it and all it started)."""
    for ignored in (signal.SIGTERM, signal.SIGINT):  # a handler, not SIG_IGN, which the engine would inherit
        signal.signal(ignored, lambda *_: None)
    engine = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509  # safe: this process has one thread
    )
    while engine.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], _POLL_SECONDS)
        if readable and not os.read(sys.stdin.fileno(), 4096):
            _end(engine, grace_seconds)
            shutil.rmtree(folder, ignore_errors=True)
            return 0
    _signal_group(engine.pid, signal.SIGKILL)  # what a dead engine left behind
    return engine.returncode


def _end(engine: subprocess.Popen[bytes], grace_seconds: float) -> None:
    _signal_group(engine.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    with contextlib.suppress(subprocess.TimeoutExpired):
        engine.wait(timeout=max(deadline - time.monotonic(), 0))
    _signal_group(engine.pid, signal.SIGKILL)
    engine.wait()


def _signal_group(group: int, which: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, which)


def serve_with_transformers(socket: str, model: str) -> None:
    """Run `transformers serve` on a Unix socket, with one model: a folder, relative to the working folder.

    Its command line knows TCP ports only. A port of the loopback interface is open to every user of the machine, who
    could go round the key, and it can be taken by someone else between choosing and binding it. uvicorn, which it
    serves with, can do better, so uvicorn is told. Request lines are not logged: the log would grow without end.
    """
    import torch
    import uvicorn
    from transformers.cli.serve import Serve

    make_config = uvicorn.Config
    quiet = {"uds": socket, "access_log": False, "log_level": "warning"}
    uvicorn.Config = lambda app, **options: make_config(app, **{**options, **quiet})
    on_cpu = not torch.accelerator.is_available()
    # CPUs without 16-bit units emulate them several times slower than fp32, and widening the weights is exact.
    Serve(
        force_model=model,
        device="cpu" if on_cpu else "auto",
        dtype="float32" if on_cpu else "auto",
        log_level="error",
    )


def main(arguments: list[str]) -> int:
    """Entry of the processes; see the module's head."""
    match arguments:
        case ["keep", folder, grace, *command] if command:
            return keep(Path(folder), float(grace), command)
        case ["transformers", socket, model]:
            serve_with_transformers(socket, model)
            return 0
        case _:
            raise SystemExit(f"not to be started by hand: {arguments}")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(code if code >= 0 else 128 - code)
