"""When the next checkpoint is due. Rank 0 decides, and the loop's reduction tells the others.

pinned `checkpoint.every`   every so many steps, and nothing else
else                        the plan's number at first; once a save was measured, what `checkpoint.interval` makes of it
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from statistics import median

from foretune.checkpoint.interval import Costs, choose_interval
from foretune.events import EventKind, Journal, read_events_from

#: Steps that a usual one is the median of.
_STEPS = 50
#: A new interval is told, and kept to, where it differs from the last one by more than this share.
_CHANGE = 0.25


class SavePace:
    """Steps between saves: planned, then from what this run's saves and failures cost.

    Args:
        journal: what happened in the run before, and what its saves took (read, and told of a new interval).
        step: that training goes on from.
        every: planned steps between saves.
        pinned: `every` was set by the user.
        max_lost_seconds: of work that a failure may cost.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        step: int,
        every: int,
        pinned: bool,
        total_steps: int,
        max_lost_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal, self._total_steps, self._max_lost = journal, total_steps, max_lost_seconds
        self._every, self._pinned, self._clock = every, pinned, clock
        self._saved_step, self._saved_at = step, clock()
        self._most_seconds = math.inf  # since the last save
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._trained, self._failures, self._offset = 0.0, 0, 0
        self._awaited = not pinned  # whether the journal will tell what a save took
        if self._awaited:
            self._read_journal()

    def due(self, step: int) -> bool:
        """Whether a checkpoint follows the end of this step (counted from 1)."""
        if self._pinned:
            return step % self._every == 0
        if self._awaited:
            self._read_journal()
        return step - self._saved_step >= self._every or self._clock() - self._saved_at >= self._most_seconds

    def saved(self, step: int) -> None:
        """Tell that a checkpoint was taken after this step."""
        self._saved_step, self._saved_at = step, self._clock()
        self._awaited = not self._pinned

    def _read_journal(self) -> None:
        """Follow the journal until it tells what a save took, and choose anew."""
        save = None
        for event, offset in read_events_from(self._journal.path, self._offset):
            self._offset = offset
            if event["kind"] == EventKind.STEP:
                self._trained += event["seconds"]
                self._steps.append(event["seconds"])
            elif event["kind"] == EventKind.FAULT:
                self._failures += 1
            elif event["kind"] == EventKind.CHECKPOINT_SAVED:
                save = event
        if save is not None and self._steps:
            self._awaited = False
            self._choose(float(save["blocked_seconds"]), float(save["seconds"]))

    def _choose(self, blocked: float, seconds: float) -> None:
        costs = Costs(median(self._steps), blocked, seconds - blocked, self._trained, self._failures)
        chosen = choose_interval(costs, total_steps=self._total_steps, max_lost_seconds=self._max_lost)
        self._most_seconds = chosen.most_seconds
        if abs(chosen.every - self._every) > _CHANGE * self._every:
            self._every = chosen.every
            steps = "step" if chosen.every == 1 else f"{chosen.every} steps"
            self._journal.write(EventKind.NOTE, message=f"saving every {steps}: {chosen.why}")
