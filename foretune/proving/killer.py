"""Kills from another process, at a random moment within a phase that the victim is held in."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from foretune.artifacts import RunFolder
from foretune.faults import fired_mark
from foretune.heartbeat import read_heartbeat

#: How long a victim is held in its phase, and when within it the blow falls, seconds.
HOLD_SECONDS = 0.5
_EARLIEST, _LATEST = 0.01, 0.35
_STACK_SECONDS = 0.05


class Killer(threading.Thread):
    """Waits until fault `number` holds its victim, then strikes once.

    Args:
        strike: what is done; by default the rank dumps its stack and gets SIGKILL.
    """

    def __init__(
        self,
        run: RunFolder,
        faults: Path,
        *,
        number: int,
        rank: int,
        seed: int,
        strike: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(name="killer", daemon=True)
        self._mark, self._chance = fired_mark(faults, number), random.Random(seed)
        self._run, self._rank, self._strike = run, rank, strike or self._kill_rank
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._mark.exists():
            if self._ended.wait(0.002):
                return
        time.sleep(self._chance.uniform(_EARLIEST, _LATEST))
        self._strike()

    def close(self) -> None:
        """End the thread, struck or not."""
        self._ended.set()
        self.join()

    def _kill_rank(self) -> None:
        kill_rank(self._run, self._rank)


def kill_rank(run: RunFolder, rank: int) -> bool:
    """SIGKILL a rank, after it has dumped its stack to RUN/logs; False if there is none."""
    beat = read_heartbeat(run.heartbeat_of(rank))
    if beat is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(beat.pid, signal.SIGUSR2)
        time.sleep(_STACK_SECONDS)
        os.kill(beat.pid, signal.SIGKILL)
        return True
    return False
