"""What a journal tells of a training, folded for the page. In: events, oldest first.  Out: `History`. No clock.

A step that was done again counts as it was done last. Time is time of training: between the end of one command and the
start of the next nobody was training, and the clock stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from foretune.events import EventKind

_NAN = float("nan")
#: Events between which a training's time passes.
_OF_TRAINING = {
    EventKind.LAUNCH,
    EventKind.TRAINING_STARTED,
    EventKind.STEP,
    EventKind.EVALUATED,
    EventKind.CHECKPOINT_SAVED,
    EventKind.FAULT,
    EventKind.RECOVERY,
    EventKind.TRAINING_FINISHED,
}


@dataclass(frozen=True)
class Step:
    """One step, as it was done last. What was not told is NaN."""

    number: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: float
    target_tokens: float
    seconds: float
    tokens_per_second: float
    memory_bytes: float


@dataclass
class Fault:
    """A failure and what was done about it. `clock`: seconds of training; `back_to`: where training went on."""

    time: float
    clock: float
    cause: str
    detail: str
    rank: int | None
    step: int | None
    phase: str | None
    action: str | None = None
    why: str = ""
    back_to: int | None = None

    @property
    def at_step(self) -> int:
        """Where it stands on a time line: at its step, or else where training went on."""
        return self.step if self.step is not None else self.back_to or 0


@dataclass(frozen=True)
class Save:
    """A checkpoint that was written."""

    clock: float
    step: int
    seconds: float
    blocked_seconds: float
    bytes: int


@dataclass
class History:
    """Everything the page says of what happened."""

    steps: dict[int, Step] = field(default_factory=dict)
    launches: list[list[tuple[float, int]]] = field(default_factory=list)  # (seconds of training, steps done)
    faults: list[Fault] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    evaluated: list[tuple[int, float]] = field(default_factory=list)  # step, held-out loss
    notes: list[str] = field(default_factory=list)
    unfinished_stage: str | None = None  # the newest command's, if it began one and told no end
    total_steps: int = 0
    world_size: int = 0
    breakdown: dict[str, float] = field(default_factory=dict)
    compared: dict[str, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    began: float | None = None
    ended: float | None = None
    stop_reason: str | None = None  # why the newest launch was asked to stop
    gave_up: bool = False  # the newest failure ended the training
    _clock: float = 0.0
    _last: float | None = None
    _recovering: bool = False

    @property
    def last_step(self) -> int:
        """The newest step that was done; 0 before the first."""
        return self.launches[-1][-1][1] if self.launches and self.launches[-1] else max(self.steps, default=0)

    @property
    def counted(self) -> list[Step]:
        """The steps that count, in order."""
        return [self.steps[number] for number in sorted(self.steps)]

    @property
    def tokens(self) -> float:
        """Tokens that were trained on, each step counted once."""
        return sum(step.tokens for step in self.steps.values() if math.isfinite(step.tokens))

    @property
    def tokens_per_second(self) -> float | None:
        """The median of the steps; the first pays for warming up and is left out where there are others."""
        rates = [step.tokens_per_second for step in self.counted if math.isfinite(step.tokens_per_second)]
        return median(rates[1:] or rates) if rates else None

    @property
    def seconds_left(self) -> float | None:
        """To the last step, at the pace of the last twenty."""
        recent = [step.seconds for step in self.counted[-20:] if math.isfinite(step.seconds)]
        return (self.total_steps - self.last_step) * sum(recent) / len(recent) if recent and self.total_steps else None


def history_of(events: Iterable[Mapping[str, Any]]) -> History:
    """Fold a journal."""
    history = History()
    for event in events:
        _fold(history, event)
    return history


def _fold(history: History, event: Mapping[str, Any]) -> None:
    kind, now = event.get("kind"), float(event.get("time", 0.0))
    history.began, history.ended = now if history.began is None else history.began, now
    if kind in _OF_TRAINING:
        _pass_time(history, kind, now)
    match kind:
        case EventKind.RUN_STARTED:
            history.versions = dict(event.get("versions") or {})
            history._recovering, history.unfinished_stage = False, None
        case EventKind.STAGE_STARTED:
            history.unfinished_stage = str(event.get("stage"))
        case EventKind.STAGE_SKIPPED | EventKind.STAGE_FINISHED:
            history.unfinished_stage = None
        case EventKind.NOTE:
            if (message := str(event.get("message", ""))) not in history.notes:
                history.notes.append(message)
        case EventKind.LAUNCH:
            history.stop_reason, history.gave_up = None, False
        case EventKind.TRAINING_STARTED:
            history.total_steps = int(event.get("total_steps") or 0)
            history.world_size = int(event.get("world_size") or 0)
            history.launches.append([(history._clock, int(event.get("step") or 0))])
            for fault in history.faults:
                if fault.back_to is None and fault.action != "stop":
                    fault.back_to = int(event.get("step") or 0)
        case EventKind.STEP:
            _add_step(history, event)
        case EventKind.EVALUATED:
            history.evaluated.append((int(event["step"]), _number(event, "loss")))
        case EventKind.CHECKPOINT_SAVED:
            blocked, size = _number(event, "blocked_seconds"), int(event.get("bytes") or 0)
            history.saves.append(Save(history._clock, int(event["step"]), _number(event, "seconds"), blocked, size))
        case EventKind.STOP_REQUESTED:
            history.stop_reason = str(event.get("reason", "asked to stop"))
        case EventKind.FAULT:
            _add_fault(history, event, now)
        case EventKind.RECOVERY:
            if history.faults:
                history.faults[-1].action, history.faults[-1].why = str(event.get("action")), str(event.get("why", ""))
            history.gave_up = event.get("action") == "stop"
        case EventKind.BREAKDOWN:
            history.breakdown = dict(event.get("seconds_by_phase") or {})
        case EventKind.PREDICTED_AGAINST_MEASURED:
            history.compared = dict(event.get("quantities") or {})


def _pass_time(history: History, kind: object, now: float) -> None:
    """Move the clock on, unless this launch is the first of a command: then the time before it was nobody's."""
    goes_on = kind != EventKind.LAUNCH or history._recovering
    if history._last is not None and goes_on:
        history._clock += max(0.0, now - history._last)
    history._last = now
    if kind == EventKind.FAULT:
        history._recovering = True
    elif kind == EventKind.TRAINING_STARTED:
        history._recovering = False


def _add_step(history: History, event: Mapping[str, Any]) -> None:
    number = int(event["step"])
    names = ("loss", "learning_rate", "grad_norm", "tokens", "target_tokens", "seconds", "tokens_per_second")
    values = {name: _number(event, name) for name in names}
    history.steps[number] = Step(number, **values, memory_bytes=_number(event, "memory_bytes"))
    if not history.launches:  # a journal that lacks its beginning
        history.launches.append([])
    history.launches[-1].append((history._clock, number))


def _add_fault(history: History, event: Mapping[str, Any], now: float) -> None:
    rank, step = (None if event.get(key) is None else int(event[key]) for key in ("rank", "step"))
    phase = None if event.get("phase") is None else str(event["phase"])
    cause, detail = str(event.get("cause", "")), str(event.get("detail", ""))
    history.faults.append(Fault(now, history._clock, cause, detail, rank, step, phase))


def _number(event: Mapping[str, Any], name: str) -> float:
    """The journal writes NaN and infinities as text; float() reads them back."""
    value = event.get(name)
    return _NAN if value is None else float(value)
