"""The live view of a run on a terminal, and plain lines where there is none.

event ──view(event)──▶ RoadState ──draw──▶ rich renderable, four times a second        (LiveView)
                                └────────▶ one line per stage and fiftieth of the steps (PlainLines)

Both are context managers that are called with each event, both write to stderr, and both end with the state as it is.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from foretune.errors import Preempted
from foretune.events import EventKind
from foretune.reporting.state import RoadState, Stage
from foretune.reporting.units import (
    bytes_text,
    duration_text,
    learning_rate_text,
    loss_text,
    printable,
    rate_text,
)

#: What a view is to its caller: something to hand every event to.
View = Callable[[Mapping[str, Any]], None]

_MARKS = {"waiting": "·", "running": "▸", "done": "✓", "skipped": "✓", "paused": "■", "failed": "✗"}
_ASCII_MARKS = {"waiting": ".", "running": ">", "done": "+", "skipped": "+", "paused": "=", "failed": "x"}
_STYLES = {
    "waiting": "dim",
    "running": "bold cyan",
    "done": "green",
    "skipped": "dim green",
    "paused": "bold yellow",
    "failed": "bold red",
}
_BARS = "▁▂▃▄▅▆▇█"
_NAME_WIDTH = 9
_NOTES_SHOWN = 3
_PLAIN_STEP_LINES = 50


@contextmanager
def open_view(
    *, title: str, stages: Sequence[str], quiet: bool = False, stream: TextIO | None = None
) -> Iterator[View]:
    """The view that suits the stream (stderr unless given): live on a terminal, lines elsewhere, nothing if `quiet`."""
    if quiet:
        yield lambda event: None
        return
    console = Console(file=stream or sys.stderr)
    with LiveView(console, title, stages) if console.is_terminal else PlainLines(console, title, stages) as view:
        yield view


class PlainLines:
    """One line per thing that happened, for logs: bounded, without colour, each complete in itself."""

    def __init__(self, console: Console, title: str, stages: Sequence[str]) -> None:
        self.console = console
        self.title = title
        self.state = RoadState(stages)
        self._next_step = self._next_saved = 0
        self._titled = False

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None and (stage := self.state.running) is not None:
            self._say(f"{stage.name}: stopped" + (" as asked" if _was_asked(kind) else ""))

    def __call__(self, event: Mapping[str, Any]) -> None:
        if not self._titled:
            self._say(self.title)
            self._titled = True
        self.state.update(event)
        for line in self._lines(event):
            self._say(line)

    def _after(self, step: int) -> int:
        """The step that is told next after this one."""
        return step + max(1, self.state.total_steps // _PLAIN_STEP_LINES)

    def _say(self, line: str) -> None:
        # Not console.print: it would wrap at 80 columns, and a line of a log must stay one line.
        self.console.file.write(printable(line) + "\n")
        self.console.file.flush()

    def _lines(self, event: Mapping[str, Any]) -> Iterator[str]:
        state, kind = self.state, event.get("kind")
        match kind:
            case EventKind.STAGE_STARTED:
                yield f"{event['stage']}: started"
            case EventKind.STAGE_SKIPPED | EventKind.STAGE_FINISHED:
                stage = state.stages[str(event["stage"])]
                yield f"{stage.name}: {_outcome(stage)}"
            case EventKind.PROGRESS:
                yield f"{event['stage']}: {event['message']}"
            case EventKind.NOTE:
                yield f"note: {state.notes[-1]}"
            case EventKind.FAULT | EventKind.RECOVERY:
                yield state.notes[-1]
            case EventKind.TRAINING_STARTED:
                yield f"train: {state.total_steps} steps, {_detail(state.stages['train'])}"
                self._next_step = self._next_saved = 0
            case EventKind.STEP:
                if state.step >= self._next_step or state.step == state.total_steps:
                    self._next_step = self._after(state.step)
                    yield f"train: step {state.step}/{state.total_steps}  {'  '.join(_figures(state))}"
            case EventKind.EVALUATED:
                assert state.evaluated is not None
                yield f"train: held-out loss {loss_text(state.evaluated[1])} at step {state.evaluated[0]}"
            case EventKind.CHECKPOINT_SAVED:
                if state.step >= self._next_saved or state.step == state.total_steps or state.stop_reason:
                    self._next_saved = self._after(state.step)
                    yield f"train: saved step {state.saved_step} in {duration_text(float(event['seconds']))}"
            case EventKind.STOP_REQUESTED:
                yield f"train: stopping after this step, then saving ({state.stop_reason})"


class LiveView:
    """The whole road on a few lines, redrawn four times a second. It appears with the first event."""

    def __init__(self, console: Console, title: str, stages: Sequence[str]) -> None:
        self.title = title
        self.state = RoadState(stages)
        self._console = console
        self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=4, vertical_overflow="crop")
        self._log_streams: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> LiveView:
        return self

    def _start(self) -> None:
        self._live.start()
        # Live puts a proxy in place of sys.stderr that prints above the view; log handlers hold the old stream.
        for handler in logging.getLogger("foretune").handlers:
            if isinstance(handler, logging.StreamHandler) and (old := handler.setStream(sys.stderr)) is not None:
                self._log_streams.append((handler, old))

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self.state.stop(asked=_was_asked(kind))
        for handler, stream in self._log_streams:
            handler.setStream(stream)
        self._live.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        self.state.update(event)
        if not self._live.is_started:
            self._start()

    def _draw(self) -> RenderableType:
        options = self._console.options
        return draw(self.state, self.title, width=options.max_width, now=time.time(), ascii_only=options.ascii_only)


def draw(state: RoadState, title: str, *, width: int, now: float, ascii_only: bool = False) -> RenderableType:
    """The view of a state, `width` columns wide. Figures are never cut, down to 40 columns."""
    lines: list[RenderableType] = [Text(printable(title), style="bold", no_wrap=True, overflow="ellipsis")]
    for stage in state.stages.values():
        lines.append(_stage_line(stage, now, width, _ASCII_MARKS if ascii_only else _MARKS))
        if stage.status in ("running", "paused", "failed") and state.total_steps and stage.name == "train":
            lines += _training(state, width, ascii_only, running=stage.status == "running")
    lines += [Text(f"  note: {printable(note)}", style="yellow") for note in state.notes[-_NOTES_SHOWN:]]
    return Group(*lines)


def _stage_line(stage: Stage, now: float, width: int, marks: Mapping[str, str]) -> RenderableType:
    took = stage.seconds
    if stage.status == "running" and stage.started is not None:
        took = now - stage.started
    name = Text(f"{stage.name:<{_NAME_WIDTH}}", style=_STYLES[stage.status])
    detail = Text(_detail(stage), style="dim" if stage.status == "skipped" else "", overflow="ellipsis", no_wrap=True)
    time_taken = Text("" if took is None else duration_text(took), style="dim", no_wrap=True)
    row = Table.grid(padding=(0, 1), expand=False)
    row.add_column(width=1)
    row.add_column(width=_NAME_WIDTH, no_wrap=True)
    row.add_column(
        width=max(width - _NAME_WIDTH - 4 - max(6, time_taken.cell_len), 10), no_wrap=True, overflow="ellipsis"
    )
    row.add_column(width=max(6, time_taken.cell_len), justify="right", no_wrap=True)
    row.add_row(Text(marks[stage.status], style=_STYLES[stage.status]), name, detail, time_taken)
    return row


def _was_asked(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, KeyboardInterrupt | Preempted)


def _detail(stage: Stage) -> str:
    return printable(stage.detail).replace("\n", " ")


def _training(state: RoadState, width: int, ascii_only: bool, *, running: bool) -> list[RenderableType]:
    indent = "  " if width < 60 else "    "
    done = f"{state.step}/{state.total_steps}"
    share = f"{100 * state.step / state.total_steps:.0f} %"
    left = state.seconds_left if running else None
    tail = "  ".join([done, share] + ([f"eta {duration_text(left)}"] if left is not None else []))
    bar_width = min(width - len(indent) - len(tail) - 2, 60)
    bar = Table.grid(padding=(0, 2, 0, 0))
    if bar_width >= 12:
        bar.add_row(
            Text(indent[:-2]), ProgressBar(state.total_steps, state.step, width=bar_width - 1), Text(tail, no_wrap=True)
        )
        lines: list[RenderableType] = [bar]
    else:
        bar.add_row(
            Text(indent[:-2]), ProgressBar(state.total_steps, state.step, width=max(width - len(indent) - 1, 5))
        )
        lines = [bar, Text(indent + tail, no_wrap=True)]
    if state.stop_reason and running:
        lines.append(Text(f"{indent}stopping after this step, then saving ({state.stop_reason})", style="bold yellow"))
    figures = _figures(state)
    if figures and not ascii_only:
        room = width - len(indent) - cell_len(figures[0]) - 2
        lines.append(
            Text.assemble(
                indent, (figures[0], "bold"), "  ", (sparkline(state.curve.points, min(room, 48)), "cyan"), no_wrap=True
            )
        )
        figures = figures[1:]
    if state.evaluated is not None:
        figures.append(f"held-out {loss_text(state.evaluated[1])} (step {state.evaluated[0]})")
    if state.saved_step is not None:
        figures.append(f"saved step {state.saved_step}")
    lines += [Text(indent + line, no_wrap=True, overflow="ellipsis") for line in _flow(figures, width - len(indent))]
    return lines


def _figures(state: RoadState) -> list[str]:
    """The figures of the last step, the loss first. Each stands alone, so that a narrow view can break between them."""
    figures = []
    if state.loss is not None:
        figures.append(f"loss {loss_text(state.loss)}")
    if state.learning_rate is not None:
        figures.append(f"lr {learning_rate_text(state.learning_rate)}")
    if state.grad_norm is not None:
        figures.append(f"grad norm {state.grad_norm:.3g}")
    if state.tokens_per_second is not None:
        figures.append(f"{rate_text(state.tokens_per_second)} tokens/s")
    if state.memory_bytes is not None:
        plan = f" of {bytes_text(state.planned_memory_bytes)} planned" if state.planned_memory_bytes else ""
        figures.append(f"memory {bytes_text(state.memory_bytes)}{plan}")
    return figures


def _flow(items: Sequence[str], width: int) -> list[str]:
    """Set items side by side, three blanks between, and start a new line where the next would not fit."""
    lines: list[str] = []
    for item in items:
        if lines and cell_len(lines[-1]) + 3 + cell_len(item) <= width:
            lines[-1] += "   " + item
        else:
            lines.append(item)
    return lines


def sparkline(points: Sequence[float], width: int) -> str:
    """The points as bars of eight heights, at most `width` of them, each the mean of equally many; NaN is a blank."""
    if width < 4 or not points:
        return ""
    count = min(width, len(points))
    bounds = [len(points) * index // count for index in range(count + 1)]
    means = [sum(points[a:b]) / (b - a) for a, b in pairwise(bounds)]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return " " * count
    low, high = min(finite), max(finite)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] if math.isfinite(mean) else " " for mean in means)


def _outcome(stage: Stage) -> str:
    if stage.status == "skipped":
        return _detail(stage)
    took = "" if stage.seconds is None else f" ({duration_text(stage.seconds)})"
    return f"{_detail(stage) or 'done'}{took}"
