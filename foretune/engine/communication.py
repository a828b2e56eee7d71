"""How long this rank waits in collectives. Told apart on a CPU only: a GPU's run beside the computation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

#: Methods of DeepSpeed's backend object that every collective of the engine goes through.
_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter_tensor",
    "reduce_scatter",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "broadcast",
    "all_to_all_single",
)


class CommunicationClock:
    """Seconds spent inside collectives, waits of asynchronous ones included, since the last `take`."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self.on_enter: Callable[[], None] = lambda: None

    def take(self) -> float:
        """Return the seconds since the last call and start again from zero."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def watch(self, backend: Any) -> None:
        """Time the collectives of a DeepSpeed communication backend object."""
        for name in _COLLECTIVES:
            method = getattr(backend, name, None)
            if method is not None:
                setattr(backend, name, self._timed(method))

    def _timed(self, method: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.on_enter()
            start = time.perf_counter()
            result = method(*args, **kwargs)
            self._seconds += time.perf_counter() - start
            return _TimedWork(result, self) if hasattr(result, "wait") else result

        return timed

    def add(self, seconds: float) -> None:
        """Count a wait."""
        self._seconds += seconds


class _TimedWork:
    """The handle of an asynchronous collective whose wait counts as communication."""

    def __init__(self, work: Any, clock: CommunicationClock) -> None:
        self._work, self._clock = work, clock

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = self._work.wait(*args, **kwargs)
        self._clock.add(time.perf_counter() - start)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
