"""torchrun's elastic agent, with warm spares: it does the rendezvous and watches, `training.spare` forks the ranks.

    python -m foretune.training.agent RUN

in (stdin): one JSON line a launch, ``{"ranks": N, "arguments": [...]}``   out (stdout): one line for each launch,
``{"exits": {"0": code, ...}, "first": [0]}`` (a negative code is a signal's number; `first` are the ranks that had
failed when the agent noticed and killed the rest).

It stays between launches, so that a restart costs a fork and a rendezvous. When one rank ends badly the others are
killed at once: they could only wait for it. Restarts are the supervisor's decision (``max_restarts`` is 0 here).

The spare is started before torch is imported here (`foretune.training.elastic`, 3 s), and ranks may be asked for before
it has imported what they need: both import at a time, and the rendezvous is over when the first rank is forked.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from foretune.distributed import die_with_parent
from foretune.training.spare import messages_alone_on_stdout


class Spare:
    """The warm process and what it says."""

    def __init__(self, run: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "foretune.training.spare", run], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._pending = b""
        self._started: list[int] = []
        self._exits: dict[int, int] = {}

    def start(self, ranks: list[dict[str, Any]]) -> list[int]:
        """Fork ranks, once everything is imported; returns their process ids."""
        self._started, self._exits = [], {}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ranks": ranks}).encode() + b"\n")
        self._process.stdin.flush()
        while not self._started:
            self._listen()
            time.sleep(0.005)
        return self._started

    def exits(self) -> dict[int, int]:
        """Exit code by process id, of those that ended."""
        self._listen()
        return dict(self._exits)

    def kill(self, pids: list[int]) -> None:
        """SIGKILL those of them that live, and wait until they are gone."""
        for pid in pids:
            if pid not in self.exits():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        while any(pid not in self.exits() for pid in pids):
            time.sleep(0.005)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"the spare process ended with {self._process.returncode}")
        data = self._process.stdout.read()
        if not data:
            return
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            self._started = message.get("started", self._started)
            if "exited" in message:
                pid, code = message["exited"]
                self._exits[pid] = code


def main() -> None:
    """Serve launches until stdin closes."""
    die_with_parent()
    say = messages_alone_on_stdout()
    spare = Spare(sys.argv[1])
    from foretune.training.elastic import launch  # not before: see the head of this file

    for line in sys.stdin:
        order = json.loads(line)
        say(launch(spare, ranks=order["ranks"], arguments=order["arguments"]))


if __name__ == "__main__":
    main()
