"""Goodput: of the wall time of a training, the share of steps that count, and where the rest went. From the journal.

    launch ─starting─▶ training_started ─▶ step ─saving, other─▶ step ─┬─noticing hangs──┬─▶ fault ─starting again─▶ …
                                            └── counts, or is done again └─steps cut short─┘

Between the end of one command and the start of the next no time is counted: nobody was training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from foretune.events import EventKind
from foretune.reporting.units import duration_text, plural


@dataclass
class Goodput:
    """Seconds of a training, all its launches together. Two can be added.

    Attributes:
        useful: of steps that count: the last time each was done.
        lost: everything else, by cause; `wall_seconds` is the sum of all.
        faults: failures that were recovered from, or ended it.
    """

    useful: float = 0.0
    lost: dict[str, float] = field(default_factory=dict)
    faults: int = 0

    @property
    def wall_seconds(self) -> float:
        return self.useful + sum(self.lost.values())

    @property
    def share(self) -> float:
        """Useful over wall time; 1 for a training that took no time."""
        return self.useful / self.wall_seconds if self.wall_seconds else 1.0

    def __add__(self, other: Goodput) -> Goodput:
        lost = {cause: self.lost.get(cause, 0.0) + other.lost.get(cause, 0.0) for cause in {**self.lost, **other.lost}}
        return Goodput(self.useful + other.useful, lost, self.faults + other.faults)

    def as_json(self) -> dict[str, Any]:
        """Plain values, rounded to milliseconds."""
        lost = {cause: round(seconds, 3) for cause, seconds in self.lost.items()}
        return {"goodput": round(self.share, 4), "useful_seconds": round(self.useful, 3), "seconds_lost": lost}


def goodput(events: Iterable[Mapping[str, Any]]) -> Goodput:
    """Account for the events of one run, in the order of its journal."""
    account = Goodput(lost=dict.fromkeys(_CAUSES, 0.0))
    lost = account.lost
    steps: dict[int, float] = {}
    between = blocked = 0.0
    mark: float | None = None  # everything before it is accounted for
    training = failed = False
    for event in events:
        kind, now = event["kind"], float(event["time"])
        if kind == EventKind.RUN_STARTED:
            failed = False  # what ended the command before has been waited out by nobody
        elif kind == EventKind.LAUNCH and not failed:
            mark, training = now, False
        elif kind == EventKind.CHECKPOINT_SAVED:
            blocked += float(event["blocked_seconds"])
        if mark is None:
            continue
        if kind == EventKind.TRAINING_STARTED:
            lost["starting again" if failed else "starting"] += now - mark
            mark, training, failed = now, True, False
        elif kind == EventKind.STEP:
            number, seconds = int(event["step"]), float(event["seconds"])
            lost["steps done again"] += steps.get(number, 0.0)
            steps[number] = seconds
            between += max(0.0, now - mark - seconds)
            mark = now
        elif kind == EventKind.FAULT:
            account.faults += 1
            if training:  # else it never got so far: all of it is starting again
                lost["noticing hangs" if event.get("cause") == "hang" else "steps cut short"] += now - mark
                mark = now
            training, failed = False, True
        elif kind == EventKind.TRAINING_FINISHED:
            between += now - mark
            mark = now
    account.useful = sum(steps.values())
    lost["saving"] = min(blocked, between)
    lost["other"] = between - lost["saving"]
    return account


_CAUSES = ("starting", "starting again", "steps done again", "steps cut short", "noticing hangs", "saving", "other")


def goodput_view(account: Goodput) -> list[RenderableType]:
    """The share and the losses, largest first."""
    lost = sorted(((seconds, cause) for cause, seconds in account.lost.items() if seconds >= 0.05), reverse=True)
    counted = f"{duration_text(account.useful)} of {duration_text(account.wall_seconds)} were steps that count"
    lines: list[RenderableType] = [
        Text(f"  goodput {account.share:.0%}: {counted}; {plural(account.faults, 'failure')}")
    ]
    if lost:
        lines.append(Text("  lost: " + ", ".join(f"{cause} {duration_text(seconds)}" for seconds, cause in lost)))
    return lines
