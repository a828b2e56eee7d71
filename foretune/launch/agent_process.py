"""The agent as a child process: it is started once, and told to launch ranks as often as needed.

Our end is two pipes with JSON lines; the other is `foretune.training.agent`, started by name (it imports torch).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

#: How long the agent gets to end by itself, seconds.
_END_SECONDS = 1.0


@dataclass(frozen=True)
class Exits:
    """Exit codes by rank (negative: a signal), and the ranks that failed first; the agent killed the others."""

    codes: dict[int, int] = field(default_factory=dict)
    first: frozenset[int] = frozenset()


class AgentProcess:
    """One agent and, through it, the ranks of this machine. All of them die with this process (PR_SET_PDEATHSIG)."""

    def __init__(self, run: Path, *, log: IO[bytes], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "foretune.training.agent", str(run)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # the terminal's Ctrl-C is for this process alone
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._pending = b""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def launch(self, *, ranks: int, arguments: list[str]) -> None:
        """Start ranks; `exits` tells when they have ended."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `alive` says the rest
            self._process.stdin.write(json.dumps({"ranks": ranks, "arguments": arguments}).encode() + b"\n")
            self._process.stdin.flush()

    def exits(self) -> Exits | None:
        """How the ranks ended, once all have; else None."""
        assert self._process.stdout is not None
        data = self._process.stdout.read()
        *lines, self._pending = (self._pending + (data or b"")).split(b"\n")
        for line in lines:
            message = json.loads(line)
            codes = {int(rank): code for rank, code in message["exits"].items()}
            return Exits(codes, frozenset(message["first"]))
        return None

    def end(self) -> None:
        """Leave no process behind, however this one came to leave."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # an idle agent ends on that
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def kill(self) -> None:
        """SIGKILL the agent, the spare and, through the kernel, the ranks: they share a session."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


class Agents:
    """Keeps one agent alive over several launches, of one run or of many on the same kind of plan."""

    def __init__(self) -> None:
        self._agent: AgentProcess | None = None

    def living(self, run: Path, *, log: IO[bytes], environment: dict[str, str]) -> AgentProcess:
        """The agent; a new one if there is none or it ended."""
        if self._agent is None or not self._agent.alive:
            self.end()
            self._agent = AgentProcess(run, log=log, environment=environment)
        return self._agent

    def kill(self) -> None:
        """SIGKILL it and its ranks."""
        if self._agent is not None:
            self._agent.kill()

    def end(self) -> None:
        """End it and its ranks."""
        if self._agent is not None:
            self._agent.end()
            self._agent = None
