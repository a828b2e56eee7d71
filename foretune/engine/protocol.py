"""What the training loop sees of an engine, and nothing more.

A global batch is: any number of ``loss = engine(...)``, ``engine.backward(loss)``; then one
``engine.step(learning_rate)``. The caller owns the boundary; every rank must make the same number of calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from foretune.artifacts import Checkpoint
from foretune.checkpoint.snapshot import StateWriter


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        grad_norm: L2 norm of the whole gradient before clipping, over all ranks.
        applied: False if the update was skipped (non-finite gradient).
        loss_scale: factor the loss was multiplied by before backward (fp16), else 1.
    """

    grad_norm: float
    applied: bool
    loss_scale: float = 1.0


class Engine(Protocol):
    """One rank's model, optimizer and gradients."""

    module: torch.nn.Module
    device: torch.device
    rank: int
    world_size: int

    def __call__(self, **inputs: Any) -> Any:
        """Forward pass of the module."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a scalar loss. The gradients of all ranks are averaged by the next `step`."""
        ...

    def step(self, learning_rate: float) -> StepResult:
        """Clip, update, forget the gradients."""
        ...

    def sum_over_ranks(self, values: list[float | torch.Tensor]) -> list[float]:
        """The sum of each value (a number, or a scalar tensor) over all ranks, the same list on every rank. float64."""
        ...

    def take_communication(self) -> float:
        """Seconds this rank spent in collectives since the last call; 0 where they can't be told apart (GPU)."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...

    def save(self, write: StateWriter) -> None:
        """Hand this rank's share of weights and optimizer states to `write`, file by file. Called by every rank."""
        ...

    def load(self, folder: Path, manifest: Checkpoint | None = None) -> None:
        """Read what `save` gave. The caller has verified the files (they are pickles).

        Args:
            manifest: of the checkpoint, which may be of another number of ranks or another stage; None: of this one.

        Raises:
            UserError: its optimizer states are of a kind that only an engine of the same layout reads.
        """
        ...
