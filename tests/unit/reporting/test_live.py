"""The views: driven by a real journal, drawn at several widths, never wider than the terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from foretune.events import EventKind, Journal, read_events
from foretune.reporting.live import LiveView, PlainLines, draw, open_view, sparkline
from foretune.reporting.state import LossCurve, RoadState

STAGES = ("prepare", "plan", "train", "evaluate", "export")
GIB = 2**30


def write_run(journal: Journal, *, steps: int, losses: Mapping[int, float] | None = None) -> None:
    """The journal of a run that is in the middle of training."""
    journal.write(EventKind.RUN_STARTED, out="runs/x")
    journal.write(EventKind.STAGE_STARTED, stage="prepare")
    journal.write(EventKind.NOTE, message="12 rows had an empty answer and were dropped")
    journal.write(EventKind.STAGE_FINISHED, stage="prepare", seconds=12.3, summary="7,324 documents · 1.24 M tokens")
    journal.write(EventKind.STAGE_SKIPPED, stage="plan", reason="already done: ZeRO-2 · 2 ranks")
    journal.write(EventKind.STAGE_STARTED, stage="train", planned_memory_bytes=int(2.3 * GIB))
    journal.write(EventKind.TRAINING_STARTED, step=0, total_steps=200, world_size=2, resumed_from=None)
    for step in range(1, steps + 1):
        loss = (losses or {}).get(step, 1 + math.exp(-step / 50))
        journal.write(
            EventKind.STEP, step=step, loss=loss, learning_rate=2e-5, grad_norm=1.31, tokens=4000, target_tokens=3000,
            seconds=2.0, tokens_per_second=1203.4, memory_bytes=int(1.9 * GIB),
        )  # fmt: skip
    journal.write(EventKind.CHECKPOINT_SAVED, step=steps, path="x", seconds=0.7, bytes=10)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "events.jsonl")
    yield journal
    journal.close()


def state_of(journal: Journal) -> RoadState:
    state = RoadState(STAGES)
    for event in read_events(journal.path):
        state.update(event)
    return state


def drawn(state: RoadState, width: int, **options: Any) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(
        draw(state, "SmolLM2-135M · gsm8k_train.jsonl → runs/SmolLM2-135M-gsm8k", width=width, now=0, **options)
    )
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_state_follows_the_journal(journal: Journal) -> None:
    write_run(journal, steps=50)
    state = state_of(journal)
    assert [stage.status for stage in state.stages.values()] == ["done", "skipped", "running", "waiting", "waiting"]
    assert (state.step, state.total_steps, state.saved_step) == (50, 200, 50)
    assert state.seconds_left == pytest.approx(150 * 2.0)
    assert state.memory_bytes == int(1.9 * GIB)
    assert len(state.curve.points) == 50


def test_a_loss_that_is_not_a_number_comes_through_the_journal(journal: Journal) -> None:
    write_run(journal, steps=3, losses={2: math.nan, 3: math.inf})
    state = state_of(journal)
    assert state.loss == math.inf
    assert math.isnan(state.curve.points[1])
    assert any("loss inf" in line for line in drawn(state, 60))


@pytest.mark.parametrize("width", [40, 50, 60, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_lost(journal: Journal, width: int) -> None:
    write_run(journal, steps=50)
    lines = drawn(state_of(journal), width)
    assert max(len(line) for line in lines) <= width
    text = " ".join(" ".join(lines).split())
    for figure in ("50/200", "25 %", "eta 5m00s", "loss 1.368", "lr 2.0e-05", "grad norm 1.31", "1,203 tokens/s",
                   "memory 1.9 GiB of 2.3 GiB planned", "saved step 50", "12 s"):  # fmt: skip
        assert figure in text, (width, figure)


def test_stopping_is_said(journal: Journal) -> None:
    write_run(journal, steps=5)
    journal.write(EventKind.STOP_REQUESTED, reason="SIGINT")
    assert any("stopping after this step, then saving (SIGINT)" in line for line in drawn(state_of(journal), 80))


def test_ascii_terminals_get_ascii_marks(journal: Journal) -> None:
    write_run(journal, steps=5)
    lines = drawn(state_of(journal), 80, ascii_only=True)
    assert [line[0] for line in lines if line[2:11].strip() in STAGES] == ["+", "+", ">", ".", "."]
    assert not any("▇" in line for line in lines)


def test_escape_sequences_from_data_do_not_reach_the_terminal(journal: Journal) -> None:
    journal.write(EventKind.STAGE_FINISHED, stage="prepare", seconds=1, summary="name\x1b]0;owned\x07 \x9b31m")
    journal.write(EventKind.NOTE, message="note\x1b[2J")
    text = "".join(drawn(state_of(journal), 80))
    assert not {"\x1b", "\x07", "\x9b"} & set(text)
    assert r"\x1b" in text


def test_plain_lines_are_bounded_and_complete(journal: Journal) -> None:
    write_run(journal, steps=200)
    out = io.StringIO()
    with PlainLines(Console(file=out), "title", STAGES) as view:
        for event in read_events(journal.path):
            view(event)
    lines = out.getvalue().splitlines()
    steps = [line for line in lines if line.startswith("train: step ")]
    assert lines[0] == "title"
    assert 50 <= len(steps) <= 52
    assert steps[0].startswith("train: step 1/200 ")
    assert steps[-1].startswith("train: step 200/200  loss 1.018  lr 2.0e-05")
    assert "prepare: 7,324 documents · 1.24 M tokens (12 s)" in lines
    assert "plan: already done: ZeRO-2 · 2 ranks" in lines
    assert "train: saved step 200 in 0.7 s" in lines


def test_plain_lines_say_which_stage_was_stopped(journal: Journal) -> None:
    write_run(journal, steps=5)
    out = io.StringIO()

    def follow() -> None:
        with PlainLines(Console(file=out), "title", STAGES) as view:
            for event in read_events(journal.path):
                view(event)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        follow()
    assert out.getvalue().splitlines()[-1] == "train: stopped"


def test_a_view_that_saw_nothing_shows_nothing() -> None:
    """A mistake found before anything began must be all that is on the screen."""
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        view: LiveView | PlainLines = LiveView(console, "t", STAGES) if terminal else PlainLines(console, "t", STAGES)
        with pytest.raises(KeyError), view:
            raise KeyError
        assert console.file.getvalue() == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize(("error", "mark"), [(KeyboardInterrupt, "■"), (RuntimeError, "✗")])
def test_live_view_ends_with_the_last_state_and_marks_what_stopped(
    journal: Journal, error: type[BaseException], mark: str
) -> None:
    write_run(journal, steps=5)
    console = Console(file=io.StringIO(), force_terminal=True, width=80)

    def follow() -> None:
        with LiveView(console, "title", STAGES) as view:
            for event in read_events(journal.path):
                view(event)
            raise error

    with pytest.raises(error):
        follow()
    last = console.file.getvalue().rpartition("title")[2]  # type: ignore[attr-defined]
    assert mark in last
    assert "5/200" in last
    assert "eta" not in last


def test_quiet_is_silent(journal: Journal) -> None:
    out = io.StringIO()
    with open_view(title="t", stages=STAGES, quiet=True, stream=out) as view:
        view(journal.write(EventKind.NOTE, message="x"))
    assert out.getvalue() == ""


def test_sparkline_has_the_shape_of_its_points() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0] * 5, 8) == "▁" * 5
    assert sparkline([1, math.nan, 2], 8) == "▁ █"
    assert sparkline([], 8) == sparkline([1, 2], 3) == ""
    assert len(sparkline(list(range(1000)), 48)) == 48


def test_curve_keeps_any_run_in_few_points_of_equal_weight() -> None:
    curve = LossCurve()
    for step in range(100_000):
        curve.add(float(step))
    assert len(curve.points) <= 512
    gaps = {right - left for left, right in zip(curve.points, curve.points[1:], strict=False)}
    assert len(gaps) == 1
