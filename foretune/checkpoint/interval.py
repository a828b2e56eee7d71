"""How often a checkpoint pays: what a save costs against what a failure would cost. Pure arithmetic, no torch.

    lost by saving    C / W            C: seconds that a save holds training up   W: seconds between saves
    lost by failing   (W / 2) / M      M: mean time between failures

is least at W = √(2CM) (Young 1974); `daly_seconds` is the better approximation where C is not small beside M.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

#: Of the training time, what saving checkpoints may take.
SAVING_SHARE = 0.05
#: Of the time, what writing them may take, behind training: it needs cores and the disk.
WRITING_SHARE = 0.25
#: Before anything failed: one failure in a day. It weighs as much as a day of this run does.
PRIOR_SECONDS = 86400.0


def mean_time_between_failures(seconds: float, failures: int) -> float:
    """Seconds, estimated from a run so far and the prior: the mean of a gamma posterior's rate, taken as 1 / rate."""
    return (PRIOR_SECONDS + seconds) / (1 + failures)


def daly_seconds(save_seconds: float, between_failures: float) -> float:
    """The time of work between two saves that loses least (Daly 2006, equation 37).

    √(2CM) · (1 + ⅓ √(C / 2M) + ⅑ (C / 2M)) - C for C < 2M, else M.
    """
    if save_seconds >= 2 * between_failures:
        return between_failures
    ratio = save_seconds / (2 * between_failures)
    return sqrt(2 * save_seconds * between_failures) * (1 + sqrt(ratio) / 3 + ratio / 9) - save_seconds


@dataclass(frozen=True)
class Costs:
    """What was measured of a run, in seconds.

    Attributes:
        step: a usual step.
        blocked: a save holds training up for so long.
        written: from the copy until the checkpoint is complete.
        trained: of the run so far, all its launches.
        failures: how often it fell back to a checkpoint meanwhile.
    """

    step: float
    blocked: float
    written: float
    trained: float
    failures: int


@dataclass(frozen=True)
class Interval:
    """Between two saves: so many steps, for this reason; but no more than `most_seconds`, should steps grow longer."""

    every: int
    why: str
    most_seconds: float


def choose_interval(costs: Costs, *, total_steps: int, max_lost_seconds: float) -> Interval:
    """How often to save.

    The least of: a tenth of the run, what Daly gives, the bound on lost work. But never so often that saving takes more
    than `SAVING_SHARE` of the time, or writing behind training more than `WRITING_SHARE`.
    """
    between_failures = mean_time_between_failures(costs.trained, costs.failures)
    best = daly_seconds(costs.blocked, between_failures)
    wishes = {
        "a tenth of the run": total_steps / 10 * costs.step,
        f"that loses least with a failure every {_time(between_failures)} (Daly 2006)": best,
        f"at most {_time(max_lost_seconds)} of work may be lost": max_lost_seconds,
    }
    needs = {
        f"saving is to take {SAVING_SHARE:.0%} of the time at most": costs.blocked / SAVING_SHARE,
        f"writing is to take {WRITING_SHARE:.0%} of the time at most": costs.written / WRITING_SHARE,
    }
    wish, need = min(wishes, key=lambda why: wishes[why]), max(needs, key=lambda why: needs[why])
    wished, needed = max(1, int(wishes[wish] / costs.step)), ceil(needs[need] / costs.step)
    scarce = needed > wished
    every = min(max(wished, needed), total_steps)
    cost = f"a save holds training up for {_time(costs.blocked)} and is written in {_time(costs.written)}"
    return Interval(every, f"{cost}; {need if scarce else wish}", max(max_lost_seconds, needs[need]))


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"
