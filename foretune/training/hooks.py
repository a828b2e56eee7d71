"""What happens after a step: the journal, TensorBoard, accounts. Checkpoints: `foretune.training.saving`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from foretune.events import EventKind, Journal
from foretune.training.loop import StepReport
from foretune.training.state import TrainState


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
