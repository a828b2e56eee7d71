"""What one rank was given to do: the artifacts it reads, who it is, and the journal if it keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foretune.artifacts import Plan, PreparedDataset, RunFolder
from foretune.config import Config
from foretune.distributed import RankInfo
from foretune.events import EventKind, Journal


@dataclass(frozen=True)
class Assignment:
    """Handed to everything that a rank builds. `journal` is rank 0's alone."""

    run: RunFolder
    config: Config
    plan: Plan
    prepared: PreparedDataset
    rank: RankInfo
    journal: Journal | None

    def tell(self, kind: EventKind, **payload: Any) -> None:
        """Write an event, once for all ranks."""
        if self.journal is not None:
            self.journal.write(kind, **payload)
