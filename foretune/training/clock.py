"""Where the time of a step goes, without slowing it down.

On a CPU a phase is what the wall clock says. On a GPU the host runs ahead, so device phases are bracketed by CUDA
events and read after the step has been waited for anyway; no extra synchronisation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class PhaseClock:
    """Seconds by phase of one step."""

    def __init__(self, device: torch.device, *, take_communication: Callable[[], float] = lambda: 0.0) -> None:
        """`take_communication` gives the seconds spent in collectives since it was last called (0 if unknown)."""
        self._on_gpu = device.type == "cuda"
        self._take_communication = take_communication
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def host(self, phase: str) -> Iterator[None]:
        """Time work of the host: data, checkpoints."""
        start = time.perf_counter()
        yield
        self._add(phase, time.perf_counter() - start)

    @contextmanager
    def device(self, phase: str) -> Iterator[None]:
        """Time work that the device does: forward, backward, step."""
        if not self._on_gpu:
            start_seconds = time.perf_counter()
            yield
            communication = self._take_communication()
            self._add(phase, time.perf_counter() - start_seconds - communication)
            self._add("communication", communication)
            return
        start: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        yield
        end.record()
        self._pending.append((phase, start, end))

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call. The device must be idle (its last step was waited for)."""
        for phase, start, end in self._pending:
            end.synchronize()
            self._add(phase, start.elapsed_time(end) / 1000)
        seconds, self._seconds, self._pending = self._seconds, {}, []
        return seconds

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds


class Laps:
    """Seconds from one call to the next, by name: where the time of something that is done once goes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What was done since the last call was `name`."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now
