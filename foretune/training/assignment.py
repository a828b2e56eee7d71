"""What one rank was given to do: the artifacts it reads, who it is, and the journal if it keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foretune.artifacts import Plan, PreparedDataset, RunFolder
from foretune.config import Config
from foretune.distributed import RankInfo
from foretune.events import EventKind, Journal
from foretune.faults import Faults
from foretune.heartbeat import Heartbeat

if TYPE_CHECKING:  # it imports torch, which the worker puts off
    from foretune.checkpoint.snapshot import MemoryWriter


@dataclass(frozen=True)
class Assignment:
    """Handed to everything that a rank builds. `journal` is rank 0's alone."""

    run: RunFolder
    config: Config
    plan: Plan
    prepared: PreparedDataset
    rank: RankInfo
    journal: Journal | None
    heartbeat: Heartbeat
    faults: Faults
    memory: MemoryWriter | None  # where snapshots go; None: saves go to disk at once
    passed_over: frozenset[int]  # steps whose data went wrong
    packs: bool | None = None  # whether this model keeps packed documents apart, if an earlier launch found out

    def tell(self, kind: EventKind, **payload: Any) -> None:
        """Write an event, once for all ranks."""
        if self.journal is not None:
            self.journal.write(kind, **payload)

    def enter(self, phase: str, step: int) -> None:
        """Beat; and go wrong here if that is armed."""
        self.heartbeat.beat(phase, step)
        if phase == "data":
            self.faults.fire("data", step)
