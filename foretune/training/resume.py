"""Going on from the newest complete checkpoint: engine, random numbers, state. The data position is arithmetic."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from foretune.artifacts import Checkpoint, layout_name
from foretune.checkpoint import layout, store
from foretune.checkpoint.snapshot import load_random_state, seed_everything
from foretune.engine import Engine
from foretune.errors import UserError
from foretune.events import EventKind
from foretune.training.assignment import Assignment
from foretune.training.state import TrainState

#: Between the seeds of two restarts: more than there are ranks.
_SEEDS_APART = 1_000_003


class NewestCheckpoint:
    """The newest checkpoint that verifies: one rank looks for it while it builds its engine, hashing on other cores."""

    def __init__(self, assignment: Assignment) -> None:
        self._found: Future[tuple[Path, Checkpoint] | None] | None = None
        if assignment.rank.is_main:
            self._found = ThreadPoolExecutor(1).submit(
                store.newest_complete,
                assignment.run.checkpoints,
                on_passed_over=lambda message: assignment.tell(EventKind.NOTE, message=message),
            )

    def agreed(self) -> Path | None:
        """The folder, the same on every rank."""
        chosen: list[str | None] = [None]
        if self._found is not None:
            found = self._found.result()
            chosen = [str(found[0]) if found else None]
        if torch.distributed.get_world_size() > 1:
            torch.distributed.broadcast_object_list(chosen, src=0)
        return None if chosen[0] is None else Path(chosen[0])


def resume(assignment: Assignment, engine: Engine, newest: NewestCheckpoint) -> tuple[TrainState, str | None]:
    """The state to go on from and the name of the checkpoint it came from (None: from the beginning).

    Raises:
        UserError: the checkpoints are of other data or numbers, or their optimizer states fit their own layout only.
    """
    state = TrainState()
    folder = newest.agreed()
    if folder is None:
        return state, None
    manifest = Checkpoint.read(folder / layout.MANIFEST)
    _check_same_run(manifest, assignment)
    engine.load(folder, manifest)
    state.load_state_dict(manifest.train_state)
    rank, plan = assignment.rank, assignment.plan
    if manifest.world_size != rank.world_size:
        # These ranks have no states of their own there; to begin anew would draw the first steps' numbers again.
        seed_everything(assignment.config.train.seed + rank.rank + _SEEDS_APART * (1 + state.step))
    elif not assignment.faults.is_broken("random_state"):
        load_random_state(folder / layout.rank_file(rank.rank))
    if (manifest.world_size, manifest.zero_stage) != (rank.world_size, plan.zero_stage):
        now = layout_name(rank.world_size, plan.zero_stage)
        what = "same data, same global batch, equal within rounding"
        assignment.tell(EventKind.NOTE, message=f"{folder.name} is of {manifest.layout}; now {now}: {what}")
    return state, folder.name


def _check_same_run(manifest: Checkpoint, assignment: Assignment) -> None:
    """A checkpoint continues the run it came from and no other."""
    plan = assignment.plan
    if manifest.fingerprint != assignment.prepared.fingerprint:
        raise UserError(
            "data",
            assignment.prepared.fingerprint[:12],
            "the checkpoints were made from other data",
            "give another --out, or delete the checkpoints",
        )
    wanted = {
        "train.precision": (manifest.precision, plan.precision),
        "method": (manifest.method, plan.method),
    }
    for field, (then, now) in wanted.items():
        if then != now:
            raise UserError(
                field, now, f"the checkpoints were made with {then}", f"set it to {then}, or give another --out"
            )
