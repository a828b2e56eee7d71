"""The warm spare as a child process: it is started once, and told to fork ranks as often as needed.

Our end is two pipes with JSON lines; the other is `foretune.training.spare`, started by name. No torch.
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


class Spare:
    """The warm process and what it says. Whoever listens for that gets a RuntimeError once it has ended."""

    def __init__(self, run: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "foretune.training.spare", run], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._pending = b""
        self._ready = False
        self._started: list[int] = []
        self._exits: dict[int, int] = {}

    def start(self, ranks: list[dict[str, Any]]) -> list[int]:
        """Fork ranks; returns their process ids."""
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

    def wait_until_ready(self) -> None:
        """Until everything is imported."""
        while not self._ready:
            self._listen()
            time.sleep(0.01)

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
            self._ready = self._ready or "ready" in message
            self._started = message.get("started", self._started)
            if "exited" in message:
                pid, code = message["exited"]
                self._exits[pid] = code
