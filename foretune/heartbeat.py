"""What a rank is doing right now, told through a few bytes of shared memory: no system call, no lock.

    rank ── `Heartbeat.beat(phase, step)` ──▶ RUN/launch/heartbeat-00000 ── `read_heartbeat` ──▶ supervisor

A beat costs about a microsecond, so that the loop can beat at every phase of every micro-batch.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

#: pid, step, beats, seconds since the epoch, phase.
_LAYOUT = struct.Struct("<qqqd16s")


@dataclass(frozen=True)
class Beat:
    """The newest beat of a rank. `step` counts finished steps; `time` is seconds since the epoch."""

    pid: int
    step: int
    beats: int
    time: float
    phase: str


class Heartbeat:
    """Written by one rank."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(descriptor, _LAYOUT.size)
        self._memory = mmap.mmap(descriptor, _LAYOUT.size)
        os.close(descriptor)
        self._pid = os.getpid()
        self._beats = 0

    def beat(self, phase: str, step: int) -> None:
        """Say that this rank has entered `phase` (at most 16 ASCII characters) with `step` steps done."""
        self._beats += 1
        _LAYOUT.pack_into(self._memory, 0, self._pid, step, self._beats, time.time(), phase.encode())


def read_heartbeat(path: Path) -> Beat | None:
    """The newest beat, or None if this rank has not beaten yet."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < _LAYOUT.size:
        return None
    pid, step, beats, seconds, phase = _LAYOUT.unpack_from(data)
    return Beat(pid, step, beats, seconds, phase.rstrip(b"\0").decode(errors="replace")) if pid else None
