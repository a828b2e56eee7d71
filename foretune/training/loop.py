"""The loop, and nothing but the loop.

for each step:  batch = loader.step(step)                 a pure function of the step number
                for each micro-batch: forward, backward
                engine.step(learning rate)                reduce, clip, update
                one reduction tells every rank the loss and whether to stop
                hooks                                     journal, checkpoint
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from foretune.data import Loader
from foretune.engine import Engine
from foretune.errors import MachineFault
from foretune.training.clock import PhaseClock
from foretune.training.objective import negative_log_likelihood, scaled_loss, to_device
from foretune.training.state import TrainState


@dataclass(frozen=True)
class StepReport:
    """What one step did, the same on every rank."""

    step: int  # steps done, this one included
    loss: float  # mean over the target tokens of the global batch, nats
    learning_rate: float
    grad_norm: float  # before clipping
    applied: bool
    loss_scale: float
    tokens: int
    target_tokens: int
    seconds: float
    seconds_by_phase: dict[str, float]
    stop: bool  # some rank was asked to stop


class Hook(Protocol):
    """Called on every rank after every step."""

    def after_step(self, report: StepReport, state: TrainState) -> None: ...


def train(
    engine: Engine,
    loader: Loader,
    state: TrainState,
    *,
    total_steps: int,
    learning_rate: Callable[[int], float],
    hooks: list[Hook],
    stop_requested: Callable[[], bool] = lambda: False,
    skips_overflow: bool = False,
) -> bool:
    """Train from `state.step` to `total_steps`. Returns False if it was asked to stop earlier.

    Args:
        learning_rate: of a step number.
        stop_requested: asked after every step; one rank that says yes stops all, after the same step.
        skips_overflow: whether a non-finite gradient is part of the game (fp16's loss scaling) or a fault.

    Raises:
        MachineFault: the loss or the gradient is not finite.
    """
    clock = PhaseClock(engine.device, take_communication=engine.take_communication)
    engine.module.train()
    while state.step < total_steps:
        start = time.perf_counter()
        with clock.host("data"):
            batch = loader.step(state.step)
        nll = torch.zeros((), dtype=torch.float64, device=engine.device)
        for micro_batch in batch.micro_batches:
            with clock.host("data"):
                inputs = to_device(micro_batch, engine.device)
            with clock.device("forward"):
                micro_nll = negative_log_likelihood(engine, inputs)
            with clock.device("backward"):
                loss = scaled_loss(micro_nll, world_size=engine.world_size, target_tokens=batch.target_tokens)
                engine.backward(loss)
            nll += micro_nll.detach()
        rate = learning_rate(state.step)
        with clock.device("step"):
            result = engine.step(rate)
        total_nll, stop = engine.sum_over_ranks([nll.item(), float(stop_requested())])
        state.step += 1
        state.tokens += batch.tokens
        state.target_tokens += batch.target_tokens
        state.skipped_steps += not result.applied
        seconds = time.perf_counter() - start
        report = StepReport(
            step=state.step,
            loss=total_nll / batch.target_tokens,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            applied=result.applied,
            loss_scale=result.loss_scale,
            tokens=batch.tokens,
            target_tokens=batch.target_tokens,
            seconds=seconds,
            seconds_by_phase=clock.take(),
            stop=stop > 0,
        )
        _check_finite(report, skips_overflow=skips_overflow)
        for hook in hooks:
            hook.after_step(report, state)
        if report.stop and state.step < total_steps:
            return False
    return True


def _check_finite(report: StepReport, *, skips_overflow: bool) -> None:
    """DeepSpeed skips an update with a non-finite gradient and only logs it: training would stand still unseen."""
    if math.isfinite(report.loss) and (skips_overflow or (report.applied and math.isfinite(report.grad_norm))):
        return
    raise MachineFault(
        f"not finite: loss {report.loss}, gradient norm {report.grad_norm}; a lower train.learning_rate usually helps",
        step=report.step,
    )
