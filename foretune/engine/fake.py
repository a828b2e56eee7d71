"""Plain PyTorch in one process behind the same door: the reference that DeepSpeed is held against, in any dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from foretune.artifacts import Checkpoint
from foretune.checkpoint.snapshot import StateWriter
from foretune.engine.protocol import StepResult


class FakeEngine:
    """`Engine` without DeepSpeed: one process, whole parameters, the textbook step.

    Args:
        module: the model, in the dtype to compute in (float64 for a reference).
        optimizer: a torch optimizer over its trainable parameters.
        max_grad_norm: clip the gradient to this L2 norm; 0 does not clip.
    """

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> None:
        self.module = module
        self.device = torch.device("cpu")
        self.rank, self.world_size = 0, 1
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> StepResult:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm or float("inf"))
        applied = bool(torch.isfinite(norm))
        if applied:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm=float(norm), applied=applied)

    def sum_over_ranks(self, values: list[float | torch.Tensor]) -> list[float]:
        return [float(value) for value in values]

    def take_communication(self) -> float:
        return 0.0

    def barrier(self) -> None:
        return None

    def save(self, write: StateWriter) -> None:
        write("fake.pt", {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()})

    def load(self, folder: Path, manifest: Checkpoint | None = None) -> None:
        state = torch.load(folder / "fake.pt", weights_only=True)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
