"""What the journal has told so far, as one small object that the views draw.

event ──RoadState.update──▶ stages, step, losses, speed, memory, notes     (no clock, no terminal: a pure fold)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from foretune.events import EventKind
from foretune.reporting.units import plural

Status = Literal["waiting", "running", "done", "skipped", "paused", "failed"]

#: Points kept for the loss curve; beyond it neighbours are averaged, so that a run of any length fits.
_CURVE_POINTS = 512


@dataclass
class Stage:
    """One stage of the road."""

    name: str
    status: Status = "waiting"
    detail: str = ""
    started: float | None = None  # seconds since the epoch
    seconds: float | None = None


class LossCurve:
    """The losses of a run of any length in at most `_CURVE_POINTS` points, each the mean of equally many steps."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self._per_point = 1
        self._pending: list[float] = []

    def add(self, loss: float) -> None:
        """Append one step's loss."""
        self._pending.append(loss)
        if len(self._pending) < self._per_point:
            return
        self.points.append(sum(self._pending) / len(self._pending))
        self._pending.clear()
        if len(self.points) >= _CURVE_POINTS:
            self.points = [(left + right) / 2 for left, right in zip(self.points[::2], self.points[1::2], strict=True)]
            self._per_point *= 2


@dataclass
class RoadState:
    """Everything a view needs. `update` takes events in the order of the journal and ignores kinds it does not know."""

    stage_names: Sequence[str]
    stages: dict[str, Stage] = field(init=False)
    step: int = 0
    total_steps: int = 0
    world_size: int = 0
    resumed_from: int | None = None
    curve: LossCurve = field(default_factory=LossCurve)
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    memory_bytes: int | None = None
    planned_memory_bytes: int | None = None
    saved_step: int | None = None
    evaluated: tuple[int, float] | None = None  # step, loss
    notes: list[str] = field(default_factory=list)
    stop_reason: str | None = None
    breakdown: dict[str, float] | None = None
    predicted_against_measured: dict[str, dict[str, float]] | None = None
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=20))

    def __post_init__(self) -> None:
        self.stages = {name: Stage(name) for name in self.stage_names}

    @property
    def running(self) -> Stage | None:
        """The stage that is being worked on."""
        return next((stage for stage in self.stages.values() if stage.status == "running"), None)

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the last step at the pace of the last twenty; None before the first."""
        if not self._seconds or not self.total_steps:
            return None
        return (self.total_steps - self.step) * sum(self._seconds) / len(self._seconds)

    def update(self, event: Mapping[str, Any]) -> None:
        """Fold one event in."""
        match event.get("kind"):
            case EventKind.STAGE_STARTED | EventKind.STAGE_SKIPPED | EventKind.STAGE_FINISHED:
                self._update_stage(event)
            case EventKind.PROGRESS:
                if (stage := self.stages.get(str(event.get("stage")))) is not None:
                    stage.detail = str(event.get("message", ""))
            case EventKind.NOTE:
                self.notes.append(str(event.get("message", "")))
            case EventKind.TRAINING_STARTED:
                self.step = int(event.get("step", 0))
                self.total_steps = int(event.get("total_steps", 0))
                self.world_size = int(event.get("world_size", 0))
                resumed_from = event.get("resumed_from")
                self.resumed_from = None if resumed_from is None else self.step
                if (stage := self.running) is not None:
                    going_on = "" if self.resumed_from is None else f", going on after step {self.resumed_from}"
                    stage.detail = plural(self.world_size, "rank") + going_on
            case EventKind.STEP:
                self._update_step(event)
            case EventKind.EVALUATED:
                self.evaluated = int(event["step"]), float(event["loss"])
            case EventKind.CHECKPOINT_SAVED:
                self.saved_step = int(event["step"])
            case EventKind.STOP_REQUESTED:
                self.stop_reason = str(event.get("reason", "asked to stop"))
            case EventKind.FAULT:
                where = "".join(f", {key} {event[key]}" for key in ("rank", "step") if event.get(key) is not None)
                self.notes.append(f"fault: {event.get('detail') or event.get('cause')}{where}")
            case EventKind.RECOVERY:
                wait = float(event.get("wait_seconds") or 0)
                pause = f", in {wait:.0f} s" if wait >= 1 else ""
                self.notes.append(f"recovery: {event.get('why')}{pause}")
            case EventKind.BREAKDOWN:
                self.breakdown = dict(event.get("seconds_by_phase") or {})
            case EventKind.PREDICTED_AGAINST_MEASURED:
                self.predicted_against_measured = dict(event.get("quantities") or {})

    def stop(self, *, asked: bool) -> None:
        """The road ended before its end, as the user asked or not: whatever was running did not finish."""
        if (stage := self.running) is not None:
            stage.status = "paused" if asked else "failed"

    def _update_stage(self, event: Mapping[str, Any]) -> None:
        stage = self.stages.setdefault(str(event["stage"]), Stage(str(event["stage"])))
        stage.detail = str(event.get("summary") or event.get("reason") or "")
        match event["kind"]:
            case EventKind.STAGE_STARTED:
                stage.status, stage.started = "running", event.get("time")
            case EventKind.STAGE_SKIPPED:
                stage.status = "skipped"
            case _:
                stage.status, stage.seconds = "done", float(event.get("seconds", 0.0))
        if event.get("planned_memory_bytes"):
            self.planned_memory_bytes = int(event["planned_memory_bytes"])

    def _update_step(self, event: Mapping[str, Any]) -> None:
        self.step = int(event["step"])
        self.loss = float(event["loss"])  # the journal writes NaN as text; float() reads it back
        self.learning_rate = _number(event.get("learning_rate"))
        self.grad_norm = _number(event.get("grad_norm"))
        self.tokens_per_second = _number(event.get("tokens_per_second"))
        memory = _number(event.get("memory_bytes"))
        self.memory_bytes = None if memory is None else max(int(memory), self.memory_bytes or 0)
        if (seconds := _number(event.get("seconds"))) is not None:
            self._seconds.append(seconds)
        self.curve.add(self.loss)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
