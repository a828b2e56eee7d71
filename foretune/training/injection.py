"""An engine that goes wrong where the armed faults say. Used only when some are armed; costs nothing otherwise."""

from __future__ import annotations

from typing import Any

import torch

from foretune.artifacts import IGNORE_INDEX
from foretune.engine import DeepSpeedEngine, StepResult
from foretune.errors import MachineFault
from foretune.faults import Faults, InjectedError
from foretune.training.state import TrainState


class FaultyEngine(DeepSpeedEngine):
    """`DeepSpeedEngine` with faults: a real one becomes it (`arm`), so that whatever holds it holds this.

    Points: `forward` fires inside the forward pass (after the embedding), `backward` inside autograd, `step` inside
    the optimizer's step, `reduction` on entering a collective between forward and the end of the step.
    """

    _faults: Faults
    _state: TrainState
    _in_collectives: bool

    @classmethod
    def arm(cls, engine: DeepSpeedEngine, faults: Faults, state: TrainState) -> None:
        """From now on `engine` has these faults."""
        engine.__class__ = cls
        assert isinstance(engine, FaultyEngine)
        engine._faults, engine._state, engine._in_collectives = faults, state, False
        engine.module.get_input_embeddings().register_forward_hook(engine._in_forward)  # type: ignore[operator]
        engine.before_update(lambda: faults.fire("step", state.step))
        engine.on_collective(engine._on_collective)

    def __call__(self, **inputs: Any) -> Any:
        labels = inputs.get("shift_labels")
        if labels is not None and self.module.training and self._faults.distorts("spike", self._state.step):
            vocabulary = self.module.get_input_embeddings().num_embeddings  # type: ignore[operator]
            inputs["shift_labels"] = torch.where(labels == IGNORE_INDEX, labels, (labels + 7) % vocabulary)
        try:
            return super().__call__(**inputs)
        except InjectedError as error:
            if "out of memory" in str(error):
                raise MachineFault(str(error), kind="device_out_of_memory") from error
            raise

    def backward(self, loss: torch.Tensor) -> None:
        if self._faults.distorts("nan", self._state.step):
            loss = loss * float("nan")
        loss.register_hook(lambda gradient: self._faults.fire("backward", self._state.step))  # type: ignore[no-untyped-call]
        self._in_collectives = True
        super().backward(loss)

    def step(self, learning_rate: float) -> StepResult:
        self._in_collectives = True
        result = super().step(learning_rate)
        self._in_collectives = False
        return result

    def _in_forward(self, *_: Any) -> None:
        if self.module.training:
            self._faults.fire("forward", self._state.step)

    def _on_collective(self) -> None:
        if self._in_collectives:
            self._faults.fire("reduction", self._state.step)
