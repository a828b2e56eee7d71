"""Saving: how a rank hands its state over. When: `foretune.training.pace`.

with memory   engine ─▶ `MemoryWriter` ─▶ index of each rank ─▶ barrier ─▶ ready.json ─▶ the supervisor writes; we go on
without       engine ─▶ `FolderWriter` ─▶ barrier ─▶ rank 0 commits
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foretune.artifacts import Checkpoint, Plan, RunFolder, write_atomically
from foretune.checkpoint import layout, store
from foretune.checkpoint.snapshot import FolderWriter, MemoryWriter, random_state
from foretune.config.schema import CheckpointConfig
from foretune.engine import Engine
from foretune.events import EventKind, Journal
from foretune.faults import NO_FAULTS, Faults
from foretune.training.loop import StepReport
from foretune.training.state import TrainState

_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class HeldOut:
    """What a save measures: `measure` gives the loss (nats per target token) of `rows` and over how many targets."""

    rows: int
    measure: Callable[[], tuple[float, int]]


class CheckpointHook:
    """Saves when it is due, at the last step, and when training was asked to stop. Runs on every rank."""

    def __init__(
        self,
        engine: Engine,
        *,
        run: RunFolder,
        plan: Plan,
        fingerprint: str,
        config: CheckpointConfig,
        journal: Journal | None,
        memory: MemoryWriter | None = None,
        local_rank: int = 0,
        enter: Callable[[str, int], None] = lambda phase, step: None,
        faults: Faults = NO_FAULTS,
        write_extras: Callable[[Path], None] = lambda folder: None,
        write_final: Callable[[Path], None] = lambda folder: None,
        held_out: HeldOut | None = None,
        on_save: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Called on every rank:

        Args:
            write_extras: adds files to every checkpoint.
            write_final: adds files to those that an export is made of: the last one and, with `keep_best`, any.
            held_out: what to measure; None measures nothing.
            on_save: told the step after each save.
        """
        self._engine, self._run, self._plan, self._config = engine, run, plan, config
        self._fingerprint, self._journal = fingerprint, journal
        self._memory, self._local_rank = memory, local_rank
        self._enter, self._faults = enter, faults
        self._write_extras, self._write_final = write_extras, write_final
        self._held_out, self._on_save = held_out, on_save
        if memory is not None and engine.device.type == "cuda":
            memory.open_window(engine.device)

    def after_step(self, report: StepReport, state: TrainState) -> None:
        last = state.step >= self._plan.total_steps
        if last or report.stop or report.save:
            self._enter("save", state.step)
            self.save(state, final=last or report.stop or self._held_out is not None)
            self._on_save(report.step)

    def save(self, state: TrainState, *, final: bool) -> None:
        """Hand everything over; on return training may go on."""
        start = time.perf_counter()
        manifest = self._manifest(state, self._held_out_loss(state))
        if self._memory is not None:
            self._into_memory(self._memory, manifest, final=final, start=start)
        else:
            self._onto_disk(manifest, final=final, start=start)
        phases = dict(state.seconds_by_phase or {})
        phases["checkpoint"] = phases.get("checkpoint", 0.0) + time.perf_counter() - start
        state.seconds_by_phase = phases
        self._faults.fire("saved", state.step)

    def _into_memory(self, memory: MemoryWriter, manifest: Checkpoint, *, final: bool, start: float) -> None:
        engine, saving = self._engine, self._run.saving
        ready = saving / layout.READY
        if engine.rank == 0:
            while ready.exists():  # the last snapshot is still being written: the disk is slower than the saves
                time.sleep(_POLL_SECONDS)
            (saving / layout.EXTRAS).mkdir(exist_ok=True)
        engine.barrier()
        memory.begin()
        engine.save(memory)
        self._faults.fire("save", manifest.step)
        memory(layout.rank_file(engine.rank), random_state())
        self._write_extras(saving / layout.EXTRAS)
        if final:
            self._write_final(saving / layout.EXTRAS)
        index = {"local_rank": self._local_rank, "blobs": memory.take()}
        (saving / f"rank-{engine.rank:05d}.json").write_text(json.dumps(index))
        engine.barrier()
        if engine.rank == 0:
            values = {
                "manifest": manifest.model_dump(mode="json"),
                "blocked_seconds": round(time.perf_counter() - start, 4),
            }
            write_atomically(ready, json.dumps(values))

    def _onto_disk(self, manifest: Checkpoint, *, final: bool, start: float) -> None:
        engine, checkpoints = self._engine, self._run.checkpoints
        partial = layout.partial_folder_of(checkpoints, manifest.step)
        if engine.rank == 0:
            store.prepare_partial(checkpoints, manifest.step)
        engine.barrier()
        write = FolderWriter(partial)
        engine.save(write)
        self._faults.fire("save", manifest.step)
        write(layout.rank_file(engine.rank), random_state())
        self._write_extras(partial)
        if final:
            self._write_final(partial)
        engine.barrier()
        if engine.rank == 0:
            folder = store.commit(partial, manifest)
            keep = self._config
            store.prune(checkpoints, keep=keep.keep, keep_every=keep.keep_every, keep_best=keep.keep_best)
            seconds = round(time.perf_counter() - start, 3)
            if self._journal is not None:
                self._journal.write(
                    EventKind.CHECKPOINT_SAVED,
                    step=manifest.step,
                    path=str(folder),
                    seconds=seconds,
                    blocked_seconds=seconds,
                    bytes=sum(file.bytes for file in store.files_of(folder).values()),
                )
        engine.barrier()

    def _held_out_loss(self, state: TrainState) -> float | None:
        """Measure it, if it is wanted, and tell the journal."""
        if self._held_out is None:
            return None
        loss, targets = self._held_out.measure()
        if self._journal is not None:
            perplexity = math.exp(min(loss, 700.0))
            self._journal.write(
                EventKind.EVALUATED, step=state.step, loss=loss, perplexity=perplexity, target_tokens=targets
            )
        return loss

    def _manifest(self, state: TrainState, held_out_loss: float | None) -> Checkpoint:
        return Checkpoint(
            step=state.step,
            world_size=self._engine.world_size,
            zero_stage=self._plan.zero_stage,
            precision=self._plan.precision,
            method=self._plan.method,
            fingerprint=self._fingerprint,
            train_state=state.state_dict(),
            files={},
            held_out_loss=held_out_loss,
            held_out_rows=self._held_out.rows if self._held_out else None,
            vectors_apart=self._plan.vectors_apart,
        )
