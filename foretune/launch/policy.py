"""What is done about each cause, and how often: a bound on everything, so that no crash loops.

killed, hang, communication, host out of memory, crash  ─▶ restart from the last good checkpoint
device out of memory                                    ─▶ replan: smaller micro-batches, the same global batch
non-finite, loss spike                                  ─▶ roll back, pass over that data window
the same cause at the same step again and again         ─▶ stop: it is no accident
more restarts in an hour than allowed                   ─▶ stop
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from foretune.config.schema import RecoverConfig
from foretune.launch.failures import Cause, Failure

Kind = Literal["restart", "replan", "pass_over", "stop"]

#: How often the same cause at the same step, which was not passed meanwhile, is taken for an accident.
_ACCIDENTS = {
    Cause.KILLED: 3,
    Cause.AGENT_LOST: 3,
    Cause.HANG: 2,
    Cause.COMMUNICATION: 2,
    Cause.HOST_OUT_OF_MEMORY: 1,
    Cause.CRASHED: 1,
    Cause.DATA: 1,
}
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Action:
    """What the supervisor does now. `why` is for people; `wait_seconds` comes before it."""

    kind: Kind
    why: str
    wait_seconds: float = 0.0


class Policy:
    """Remembers what happened in this run and decides what to do next."""

    def __init__(self, config: RecoverConfig, *, clock: Callable[[], float]) -> None:
        """`clock` gives seconds, monotonic."""
        self._config, self._clock = config, clock
        self._restarts: list[float] = []
        self._seen: Counter[tuple[Cause, int | None]] = Counter()
        self._windows = 0
        self._without_progress = 0

    def progressed(self, done: int) -> None:
        """So many steps are done: the next wait is short again, and what failed before that step was an accident."""
        self._without_progress = 0
        for cause, step in [seen for seen in self._seen if seen[1] is not None and seen[1] < done]:
            del self._seen[cause, step]

    def decide(self, failure: Failure) -> Action:
        """What to do about a failure. Counts it."""
        now = self._clock()
        self._restarts = [time for time in self._restarts if now - time < 3600]
        if len(self._restarts) >= self._config.restarts_per_hour:
            return Action("stop", f"{len(self._restarts)} restarts within an hour, which is the bound")
        self._restarts.append(now)
        self._seen[failure.cause, failure.step] += 1
        times = self._seen[failure.cause, failure.step]
        # Back-off only where nothing was achieved in between: a machine in trouble wants time, an accident does not.
        wait = 0.0 if self._without_progress == 0 else _FIRST_WAIT_SECONDS * 2 ** (self._without_progress - 1)
        self._without_progress += 1
        wait = min(wait, _LONGEST_WAIT_SECONDS)
        if failure.cause == Cause.DEVICE_OUT_OF_MEMORY:
            return Action(
                "replan", "the device's memory did not do: smaller micro-batches, the same global batch", wait
            )
        if failure.cause in (Cause.NON_FINITE, Cause.LOSS_SPIKE):
            self._windows += 1
            if self._windows > self._config.passed_over_windows:
                return Action("stop", f"{self._windows} data windows went wrong; a lower train.learning_rate may help")
            return Action(
                "pass_over", f"back to the last good checkpoint, passing over the data of step {failure.step}"
            )
        if times > _ACCIDENTS[failure.cause]:
            return Action("stop", f"the same failure at the same step, {times} times: it would happen again")
        return Action("restart", "from the last good checkpoint", wait)
