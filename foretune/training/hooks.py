"""What happens after a step: the journal, TensorBoard, accounts. Checkpoints: `foretune.training.saving`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from foretune.events import EventKind, Journal
from foretune.training.loop import StepReport
from foretune.training.state import TrainState

#: The step of a launch after which the peak is held against the plan.
CHECKED_STEP = 2
#: What a prediction may be off before it is said: the bound that plans are judged by. On a CPU the process itself, and
#: what its libraries keep, vary by some hundred megabytes, whatever the model.
PEAK_TOLERANCE = 0.06
PEAK_SLACK_BYTES = 2**29


class JournalHook:
    """Writes every step to the journal (rank 0), and to TensorBoard where it is installed."""

    def __init__(self, journal: Journal, *, device: torch.device, tensorboard: Path | None) -> None:
        self._journal = journal
        self._device = device
        self._writer = _tensorboard_writer(tensorboard) if tensorboard else None

    def after_step(self, report: StepReport, state: TrainState) -> None:
        values = {
            "loss": report.loss,
            "learning_rate": report.learning_rate,
            "grad_norm": report.grad_norm,
            "tokens_per_second": report.tokens / report.seconds,
        }
        self._journal.write(
            EventKind.STEP,
            step=report.step,
            **values,
            tokens=report.tokens,
            target_tokens=report.target_tokens,
            seconds=round(report.seconds, 6),
            seconds_by_phase={phase: round(seconds, 6) for phase, seconds in report.seconds_by_phase.items()},
            memory_bytes=peak_memory_bytes(self._device),
            applied=report.applied,
            loss_scale=report.loss_scale,
        )
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"train/{name}", value, report.step)

    def close(self) -> None:
        """Flush TensorBoard's files."""
        if self._writer is not None:
            self._writer.close()


class PeakCheckHook:
    """Holds the peak of memory after the first two steps of a launch against the plan, and says so if it is off.

    By then every buffer has been there once: the optimizer's states are made in the first step.

    Args:
        predicted_bytes: of a rank, as `peak_memory_bytes` measures it (a GPU: without context and allocator).
    """

    def __init__(self, journal: Journal, *, device: torch.device, predicted_bytes: int) -> None:
        self._journal, self._device, self._predicted = journal, device, predicted_bytes
        self._steps = 0

    def after_step(self, report: StepReport, state: TrainState) -> None:
        self._steps += 1
        if self._steps != CHECKED_STEP:
            return
        measured = peak_memory_bytes(self._device)
        slack = PEAK_SLACK_BYTES if self._device.type == "cpu" else 0
        if abs(measured - self._predicted) <= PEAK_TOLERANCE * self._predicted + slack:
            return
        way = "more" if measured > self._predicted else "less"
        message = (
            f"peak memory of a rank is {abs(measured / self._predicted - 1):.0%} {way} than planned:"
            f" {measured / 2**30:.1f} GiB after {CHECKED_STEP} steps, {self._predicted / 2**30:.1f} GiB predicted"
        )
        self._journal.write(
            EventKind.NOTE, message=message, step=report.step, measured_bytes=measured, predicted_bytes=self._predicted
        )


class AccountingHook:
    """Adds a step's times to the state, so that a resumed run accounts for all its launches."""

    def after_step(self, report: StepReport, state: TrainState) -> None:
        state.seconds += report.seconds
        totals = dict(state.seconds_by_phase or {})
        for phase, seconds in report.seconds_by_phase.items():
            totals[phase] = totals.get(phase, 0.0) + seconds
        state.seconds_by_phase = totals


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: allocated on the GPU, or resident in the host (VmHWM)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _tensorboard_writer(folder: Path) -> Any:
    """A writer where TensorBoard is installed, else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
