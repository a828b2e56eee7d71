"""What happens after a step: the journal, TensorBoard, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from foretune.artifacts import Checkpoint, Plan
from foretune.checkpoint import layout, store
from foretune.checkpoint.snapshot import save_random_state
from foretune.engine import Engine
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


class CheckpointHook:
    """Saves every so many steps, at the last one, and when training was asked to stop. Runs on every rank."""

    def __init__(
        self,
        engine: Engine,
        *,
        checkpoints: Path,
        plan: Plan,
        fingerprint: str,
        keep: int,
        journal: Journal | None,
        write_extras: Callable[[Path], None] = lambda folder: None,
        write_final: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """`write_extras` adds files to every checkpoint, `write_final` to those that end a training; on every rank."""
        self._engine, self._checkpoints, self._plan = engine, checkpoints, plan
        self._fingerprint, self._keep, self._journal = fingerprint, keep, journal
        self._write_extras, self._write_final = write_extras, write_final

    def after_step(self, report: StepReport, state: TrainState) -> None:
        last = report.step >= self._plan.total_steps
        if last or report.stop or report.step % self._plan.checkpoint_every == 0:
            self.save(state, final=last or report.stop)

    def save(self, state: TrainState, *, final: bool) -> None:
        """Stage, let every rank write, commit on rank 0, prune."""
        start = time.perf_counter()
        engine = self._engine
        partial = layout.partial_folder_of(self._checkpoints, state.step)
        if engine.rank == 0:
            store.prepare_partial(self._checkpoints, state.step)
        engine.barrier()
        engine.save(partial)
        save_random_state(partial / layout.rank_file(engine.rank))
        self._write_extras(partial)
        if final:
            self._write_final(partial)
        engine.barrier()
        if engine.rank == 0:
            self._commit(partial, state, start)
        engine.barrier()
        phases = dict(state.seconds_by_phase or {})
        phases["checkpoint"] = phases.get("checkpoint", 0.0) + time.perf_counter() - start
        state.seconds_by_phase = phases

    def _commit(self, partial: Path, state: TrainState, start: float) -> None:
        manifest = Checkpoint(
            step=state.step,
            world_size=self._engine.world_size,
            zero_stage=self._plan.zero_stage,
            precision=self._plan.precision,
            method=self._plan.method,
            fingerprint=self._fingerprint,
            train_state=state.state_dict(),
            files={},
        )
        folder = store.commit(partial, manifest)
        store.prune(self._checkpoints, keep=self._keep)
        if self._journal is not None:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            self._journal.write(
                EventKind.CHECKPOINT_SAVED,
                step=state.step,
                path=str(folder),
                seconds=round(time.perf_counter() - start, 3),
                bytes=size,
            )


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
