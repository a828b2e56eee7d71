"""The loop, and nothing but the loop.

for each step:  batch = loader.step(step)                 a pure function of the step number
                for each micro-batch: forward, backward
                engine.step(learning rate)                reduce, clip, update
                one reduction tells every rank the loss, whether to stop and whether to save
                is the loss finite, and no spike?         else the supervisor goes back and passes this data over
                hooks                                     journal, checkpoint
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Protocol

import torch

from foretune.data import Loader
from foretune.engine import Engine
from foretune.training.clock import PhaseClock
from foretune.training.guard import check_loss
from foretune.training.objective import negative_log_likelihood, share_of_mean, to_device
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
    save: bool = False  # some rank says that a checkpoint is due


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
    save_due: Callable[[int], bool] = lambda step: False,
    enter: Callable[[str, int], None] = lambda phase, step: None,
    passed_over: Container[int] = (),
    spike: float = 0.0,
    skips_overflow: bool = False,
) -> bool:
    """Train from `state.step` to `total_steps`. Returns False if it was asked to stop earlier.

    Args:
        learning_rate: of a step number.
        stop_requested: asked after every step; one rank that says yes stops all, after the same step.
        save_due: asked after every step (counted from 1); where one rank says yes, all save.
        enter: told the phase and the steps done whenever a phase begins (heartbeat).
        passed_over: steps whose data is not trained on.
        spike: robust z-score above which a loss is a fault; 0 is off.
        skips_overflow: whether a non-finite gradient is part of the game (fp16's loss scaling) or a fault.

    Raises:
        MachineFault: the loss or the gradient is not finite, or the loss is a spike.
    """
    clock = PhaseClock(engine.device, take_communication=engine.take_communication)
    engine.module.train()
    upcoming = None
    _pass_over(state, passed_over)
    while state.step < total_steps:
        start = time.perf_counter()
        enter("data", state.step)
        with clock.host("data"):
            batch = upcoming or loader.step(state.step)
        nll = torch.zeros((), dtype=torch.float64, device=engine.device)
        scale = share_of_mean(world_size=engine.world_size, target_tokens=batch.target_tokens)
        for micro_batch in batch.micro_batches:
            with clock.host("data"):
                inputs = to_device(micro_batch, engine.device)
            enter("forward", state.step)
            with clock.device("forward"):
                micro_nll = negative_log_likelihood(engine, inputs, gradient_scale=scale)
            enter("backward", state.step)
            with clock.device("backward"):
                engine.backward(micro_nll * scale)
            nll += micro_nll.detach()
        rate = learning_rate(state.step)
        with clock.host("data"):  # while the device is busy: nothing has been waited for yet
            after = state.step + 1
            upcoming = loader.step(after) if after < total_steps and after not in passed_over else None
        enter("step", state.step)
        with clock.device("step"):
            result = engine.step(rate)
        number = state.step
        total_nll, stop, save = engine.sum_over_ranks([nll, float(stop_requested()), float(save_due(number + 1))])
        state.step += 1
        state.tokens += batch.tokens
        state.target_tokens += batch.target_tokens
        state.skipped_steps += not result.applied
        seconds = time.perf_counter() - start
        report = StepReport(
            step=number + 1,
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
            save=save > 0,
        )
        check_loss(report, state, spike=spike, skips_overflow=skips_overflow)
        _pass_over(state, passed_over)
        enter("log", state.step)
        for hook in hooks:
            hook.after_step(report, state)
        if report.stop and state.step < total_steps:
            return False
    return True


def _pass_over(state: TrainState, passed_over: Container[int]) -> None:
    """Step over the data windows that went wrong before."""
    while state.step in passed_over:
        state.step += 1
        state.passed_over_steps += 1
