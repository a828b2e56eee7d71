"""What training must remember that cannot be computed from the step number."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainState:
    """Counts over the whole run, all launches together.

    Attributes:
        step: optimizer steps done; the next one is number `step` (from 0).
        tokens: tokens of all documents trained on (padding not counted).
        target_tokens: those of them that were targets.
        skipped_steps: steps whose update was not applied (fp16 overflow).
        passed_over_steps: steps whose data went wrong and was not trained on.
        recent_losses: of the last steps, newest last; what the next loss is compared with.
        seconds: wall time inside the loop.
        seconds_by_phase: where it went.
    """

    step: int = 0
    tokens: int = 0
    target_tokens: int = 0
    skipped_steps: int = 0
    passed_over_steps: int = 0
    recent_losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    seconds_by_phase: dict[str, float] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for one in fields(self):
            setattr(self, one.name, values[one.name])

    def breakdown(self) -> dict[str, float]:
        """Seconds by phase, with what no phase accounts for as "other". Checkpoints are written between the steps."""
        phases = {phase: round(value, 3) for phase, value in (self.seconds_by_phase or {}).items()}
        inside = sum(value for phase, value in phases.items() if phase != "checkpoint")
        return {**phases, "other": round(max(0.0, self.seconds - inside), 3)}
