"""What a page is made of: every artifact of a run folder that is there, and nothing that must be.

RUN ──read_material──▶ Material: config, data, plan, history, checkpoints, evaluation, export; what could not be read
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from foretune.artifacts import (
    Artifact,
    Checkpoint,
    EvaluationReport,
    ExportedModel,
    Outcome,
    Plan,
    PreparedDataset,
    RunFolder,
)
from foretune.checkpoint import layout
from foretune.config import Config, load_config
from foretune.errors import UserError
from foretune.events import read_events
from foretune.reporting.goodput import Goodput, goodput
from foretune.reporting.page.history import History, history_of

A = TypeVar("A", bound=Artifact)
T = TypeVar("T")

#: What `foretune prove` leaves in its folder: the matrix, and the random kills.
PROOF, SOAK = "prove.json", "soak.json"
_PROOF_KEYS = ("cells", "seconds", "passed")
_SOAK_KEYS = ("kills", "runs", "wrong", "seconds_lost", "passed", "seconds", "goodput")


@dataclass(frozen=True)
class Material:
    """What is there of a run; None or empty for what is not.

    Attributes:
        in_use: a process is working on this run right now.
        diagnosis: of ranks that ended with a mistake of the user's, which no journal tells.
        damaged: artifacts that could not be read, a sentence for each.
    """

    run: RunFolder
    config: Config | None
    prepared: PreparedDataset | None
    plan: Plan | None
    history: History
    account: Goodput
    checkpoints: list[Checkpoint]
    evaluation: EvaluationReport | None
    exported: list[ExportedModel]
    in_use: bool = False
    diagnosis: str | None = None
    damaged: list[str] = field(default_factory=list)

    @property
    def total_steps(self) -> int:
        return self.plan.total_steps if self.plan else self.history.total_steps

    @property
    def saved_step(self) -> int:
        """Of the newest checkpoint; 0 without one."""
        return max((checkpoint.step for checkpoint in self.checkpoints), default=0)

    @property
    def trained(self) -> bool:
        """Whether the last step of the plan is saved."""
        return 0 < self.total_steps <= self.saved_step


def read_material(run: RunFolder, *, in_use: bool = False) -> Material:
    """Read what is there. An artifact that can't be read is named, and the rest is still shown."""
    damaged: list[str] = []

    def try_to(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except UserError as error:
            damaged.append(f"{error.field}: {error.problem}")
        except (KeyError, TypeError, ValueError) as error:
            damaged.append(f"{run.events.name}: a line lacks something ({error!r})")
        return None

    def artifact(kind: type[A], path: Path) -> A | None:
        return try_to(lambda: kind.read(path)) if path.is_file() else None

    steps = layout.complete_steps(run.checkpoints)
    manifests = [artifact(Checkpoint, layout.folder_of(run.checkpoints, step) / layout.MANIFEST) for step in steps]
    export = [run.export / ExportedModel.file_name, *sorted(run.export.glob(f"*/{ExportedModel.file_name}"))]
    exported = [artifact(ExportedModel, path) for path in export]
    events = list(read_events(run.events))
    outcomes = [artifact(Outcome, path) for path in sorted(run.launch.glob("outcome-*.json"))]
    return Material(
        run=run,
        config=try_to(lambda: load_config(run.config)),
        prepared=artifact(PreparedDataset, run.data / PreparedDataset.file_name),
        plan=artifact(Plan, run.plan),
        history=try_to(lambda: history_of(events)) or History(),
        account=try_to(lambda: goodput(events)) or Goodput(),
        checkpoints=[manifest for manifest in manifests if manifest is not None],
        evaluation=artifact(EvaluationReport, run.evaluation),
        exported=[model for model in exported if model is not None],
        in_use=in_use,
        diagnosis=next((_mistake(outcome) for outcome in outcomes if outcome and outcome.status == "user_error"), None),
        damaged=damaged,
    )


def read_proof(folder: Path) -> dict[str, Mapping[str, Any]]:
    """What `foretune prove` left in a folder: ``{"prove.json": …, "soak.json": …}``, those that are there.

    Raises:
        UserError: one of them is damaged.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for name, needed in ((PROOF, _PROOF_KEYS), (SOAK, _SOAK_KEYS)):
        path = folder / name
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            missing = [key for key in needed if key not in values]
        except (ValueError, TypeError) as error:
            raise UserError("RUN", str(path), f"is damaged ({error})", "run `foretune prove` again") from None
        if missing:
            raise UserError("RUN", str(path), f"has no {missing[0]!r}", "run `foretune prove` again")
        found[name] = values
    return found


def _mistake(outcome: Outcome) -> str:
    return f"{outcome.field}: {outcome.problem}; mend: {outcome.mend}"
