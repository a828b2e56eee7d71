"""The peak of memory is held against the plan once, and said only where it is off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foretune.events import EventKind, Journal, read_events
from foretune.training.hooks import CHECKED_STEP, PEAK_SLACK_BYTES, PeakCheckHook, peak_memory_bytes
from foretune.training.loop import StepReport
from foretune.training.state import TrainState

CPU = torch.device("cpu")


def report(step: int) -> StepReport:
    return StepReport(
        step=step, loss=1.0, learning_rate=0.0, grad_norm=1.0, applied=True, loss_scale=1.0, tokens=1,
        target_tokens=1, seconds=1.0, seconds_by_phase={}, stop=False,
    )  # fmt: skip


@pytest.mark.parametrize(("share", "said"), [(1.0, None), (4.0, "less"), (0.01, "more")])
def test_a_plan_that_is_off_is_said(share: float, said: str | None, tmp_path: Path) -> None:
    ballast = torch.ones(PEAK_SLACK_BYTES // 2)  # two gibibytes: more than what a CPU's plan may be off by
    path = tmp_path / "events.jsonl"
    hook = PeakCheckHook(Journal(path), device=CPU, predicted_bytes=int(share * peak_memory_bytes(CPU)))
    del ballast
    for step in range(1, CHECKED_STEP + 3):
        hook.after_step(report(step), TrainState())
    notes = [event for event in read_events(path) if event["kind"] == EventKind.NOTE]
    assert len(notes) == (said is not None)
    if said:
        assert said in notes[0]["message"]
        assert notes[0]["step"] == CHECKED_STEP
