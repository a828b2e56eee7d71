"""Are the ranks alive and moving? Heartbeats are read, a hang is found, and the guilty rank is named with its line.

heartbeats ──older than the bound of their phase──▶ every rank dumps its Python stack ──▶ who does not wait for others?
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from foretune.artifacts import RunFolder
from foretune.heartbeat import Beat, read_heartbeat

#: Import, first collective, loading weights, compiling: no bound that fits all; generous.
_START_SECONDS = 1800.0
#: A launch's first step pays for what is made or imported late: it gets this many times a bound of the user's.
_FIRST_STEP_FACTOR = 5.0
#: Without a bound of the user's: this many times the usual step, but never less than the floor.
_STEP_FACTOR = 20.0
_FLOOR_SECONDS = 120.0
_SAVE_SECONDS = 1800.0
#: Signal that makes a rank dump its stack (`faulthandler`, C level: it works inside a blocking collective too).
DUMP_SIGNAL = signal.SIGUSR2
_DUMP_SECONDS = 2.0
#: Frames in which a rank waits for its peers.
_WAITING = re.compile(r"distributed_c10d\.py|deepspeed/comm/")
_FRAME = re.compile(r'File "(.+)", line (\d+) in (.+)')


@dataclass(frozen=True)
class Hang:
    """A rank that does not move. `where` is a file, line and function, or what the kernel says of the process."""

    rank: int
    step: int
    phase: str
    where: str
    seconds: float


class Health:
    """Watches the heartbeats of one launch."""

    def __init__(self, run: RunFolder, *, ranks: int, hang_seconds: float | None) -> None:
        """`hang_seconds` bounds every phase of a step (the first gets more time); None adapts to the step time."""
        self._run, self._ranks, self._bound = run, ranks, hang_seconds
        self._step_seconds: deque[float] = deque(maxlen=50)

    def beats(self) -> dict[int, Beat]:
        """The newest beat of each rank that has beaten."""
        found = {rank: read_heartbeat(self._run.heartbeat_of(rank)) for rank in range(self._ranks)}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    def took_step(self, seconds: float) -> None:
        """Tell how long a step took."""
        self._step_seconds.append(seconds)

    def hang(self) -> Hang | None:
        """The guilty rank, if nobody moves any more; its stack is in RUN/logs by then."""
        beats = self.beats()
        if len(beats) < self._ranks:
            return None
        now = time.time()
        # All must stand still: one that still beats may be what the others wait for.
        stale = {rank: now - beat.time for rank, beat in beats.items() if now - beat.time > self._limit(beat)}
        if len(stale) < self._ranks:
            return None
        return self._find_guilty(beats, min(stale.values()))

    def _limit(self, beat: Beat) -> float:
        if beat.phase in ("start", "end"):
            return _START_SECONDS
        if self._bound is not None:
            return self._bound * (1.0 if self._step_seconds else _FIRST_STEP_FACTOR)
        if beat.phase == "save":
            return _SAVE_SECONDS
        usual = median(self._step_seconds) if self._step_seconds else _START_SECONDS / _STEP_FACTOR
        return max(_FLOOR_SECONDS, _STEP_FACTOR * usual)

    def _find_guilty(self, beats: Mapping[int, Beat], seconds: float) -> Hang:
        stopped = [rank for rank, beat in beats.items() if _state(beat.pid) in "Tt"]
        stacks = self._dump_stacks(beats)
        waiting = {rank for rank, stack in stacks.items() if _WAITING.search(stack)}
        suspects = stopped or [rank for rank in beats if rank not in waiting] or list(beats)
        rank = min(suspects, key=lambda suspect: (beats[suspect].step, beats[suspect].beats))
        where = _innermost(stacks.get(rank, ""))
        if rank in stopped:
            where = f"stopped (SIGSTOP), at {where}"
        beat = beats[rank]
        return Hang(rank, beat.step, beat.phase, where, seconds)

    def _dump_stacks(self, beats: Mapping[int, Beat]) -> dict[int, str]:
        """Python stacks by rank, as each wrote them to RUN/logs; what is there from earlier is cut off."""
        paths = {rank: self._run.stack_of(rank) for rank in beats}
        before = {rank: path.stat().st_size if path.exists() else 0 for rank, path in paths.items()}
        for beat in beats.values():
            with suppress(ProcessLookupError):
                os.kill(beat.pid, DUMP_SIGNAL)
                os.kill(beat.pid, signal.SIGCONT)  # a stopped process would dump only once it goes on
        deadline = time.monotonic() + _DUMP_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.05)
            if all(path.exists() and path.stat().st_size > before[rank] for rank, path in paths.items()):
                break
        time.sleep(0.05)
        return {rank: _from(path, before[rank]) for rank, path in paths.items() if path.exists()}


def _state(pid: int) -> str:
    """The kernel's letter for a process: R, S, D, T (stopped) …; X if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return "X"


def _from(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")


def _innermost(stack: str) -> str:
    """File, line and function where the main thread is; faulthandler prints the innermost frame first."""
    main = stack.rsplit("Current thread", maxsplit=1)[-1] if "Current thread" in stack else stack
    frame = _FRAME.search(main)
    return f"{Path(frame[1]).name}:{frame[2]} in {frame[3]}" if frame else "an unknown place (it dumped no stack)"


def oom_kills() -> int:
    """How many processes the kernel's OOM killer has ended: in this control group, else on this machine."""
    for path in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        try:
            for line in path.read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
        except (OSError, ValueError):
            continue
    return 0
