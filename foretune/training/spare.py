"""A warm spare: a process that has imported everything and does nothing, until it is told to become ranks by forking.

    python -m foretune.training.spare RUN

in (stdin): one JSON line a launch, ``{"ranks": [{"environment": {...}, "arguments": [...]}, ...]}``
out (stdout): ``{"ready": true}``, then ``{"started": [pid, ...]}`` and ``{"exited": [pid, code]}``; a negative code is
a signal's number.

Imports cost 5 s a process, a fork milliseconds: ranks are back that much sooner after a fault, and several ranks share
one import. It must stay single-threaded and must never touch the GPU: a forked process can't use CUDA once its parent
has. No semaphore is made, so that none is left behind when it is killed.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from foretune.distributed import die_with_parent, leave

#: How often exits of ranks are looked for, seconds.
_POLL_SECONDS = 0.02


def main() -> None:
    """Import, say so, and serve until stdin closes."""
    die_with_parent()
    say = messages_alone_on_stdout()
    gc.disable()  # what is imported stays: looking through it, again and again, took a seventh of the time or more
    _import_all(Path(sys.argv[1]))
    gc.collect()
    gc.freeze()  # the collector would otherwise write to, and so copy, every inherited page
    gc.enable()
    say({"ready": True})
    living: set[int] = set()
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
    pending = b""
    while True:
        if selector.select(_POLL_SECONDS if living else None):
            data = os.read(sys.stdin.fileno(), 1 << 20)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                pids = [_fork(rank) for rank in json.loads(line)["ranks"]]
                living.update(pids)
                say({"started": pids})
        for pid in list(living):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                living.discard(pid)
                say({"exited": [pid, os.waitstatus_to_exitcode(status)]})


def messages_alone_on_stdout() -> Callable[[dict[str, Any]], None]:
    """Send what libraries print to stderr; returns what writes a message to the pipe that stdout was."""
    out = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(message: dict[str, Any]) -> None:
        os.write(out, json.dumps(message).encode() + b"\n")

    return say


def _fork(rank: dict[str, Any]) -> int:
    """Start one rank; returns its process id. The child never returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, sys.stdin.fileno())
        os.environ.update(rank["environment"])
        from foretune.training import worker

        code = worker.main(rank["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        leave(code)


def _import_all(run: Path) -> None:
    """Everything that a rank will import, the model's own module included."""
    import pyarrow  # noqa: F401
    import transformers.integrations.deepspeed  # noqa: F401

    import foretune.training.build
    import foretune.training.loop
    import foretune.training.resume  # noqa: F401
    from foretune.artifacts import Plan, RunFolder
    from foretune.engine import import_late_modules
    from foretune.model.loading import import_model_class

    import_late_modules()
    with suppress(ImportError):  # an extra
        import torch.utils.tensorboard
    folder = RunFolder(run)
    if folder.plan.is_file():
        plan = Plan.read(folder.plan)
        if plan.zero_stage == 3:
            import torch._dynamo  # noqa: F401  # what loading in parts needs; 1.5 s
        if plan.method == "lora":
            import peft  # noqa: F401
        import_model_class(Path(plan.model))


if __name__ == "__main__":
    main()
