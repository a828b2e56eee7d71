"""Is a loss to be believed? What is not finite, or far from what came before, must not reach the weights unseen.

DeepSpeed skips an update with a non-finite gradient and only logs it, or, at stage 0, applies it. Here it is a fault of
the step whose data gave it: the supervisor goes back to the last good checkpoint and passes that data over.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Protocol

from foretune.errors import MachineFault
from foretune.training.state import TrainState

#: Losses that the next one is compared with, and how many there must be.
HISTORY = 50
_FEWEST = 8
#: Of a normal distribution: the standard deviation is this many times the median absolute deviation.
_SIGMA = 1.4826
#: A spike is also this many times the median, and above all before: losses that hardly vary make any z-score large.
_FACTOR = 1.5


class Measured(Protocol):
    """What is looked at of a step's report."""

    @property
    def step(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def applied(self) -> bool: ...


def check_loss(report: Measured, state: TrainState, *, spike: float, skips_overflow: bool) -> None:
    """Raise if this step's loss or gradient is bad; remember the loss otherwise.

    Args:
        spike: robust z-score, (loss - median) / (1.4826 · MAD) over the last 50 steps (Iglewicz and Hoaglin 1993,
            section 3.3, without their constant for normal data taken out), above which a loss is a spike; 0 is off.
        skips_overflow: a non-finite gradient is part of the game (fp16's loss scaling).

    Raises:
        MachineFault: kind ``non_finite`` or ``loss_spike``; its step is the number (from 0) whose data gave the loss.
    """
    number = report.step - 1
    finite = math.isfinite(report.loss)
    if not finite or not (skips_overflow or (report.applied and math.isfinite(report.grad_norm))):
        raise MachineFault(
            f"not finite: loss {report.loss}, gradient norm {report.grad_norm}", step=number, kind="non_finite"
        )
    before = state.recent_losses
    if spike and len(before) >= _FEWEST:
        usual = median(before)
        spread = _SIGMA * median(abs(loss - usual) for loss in before)
        score = (report.loss - usual) / max(spread, 1e-6)
        if score > spike and report.loss > max(_FACTOR * usual, *before):
            raise MachineFault(
                f"a spike: loss {report.loss:.3f} where {usual:.3f} is usual (robust z-score {score:.0f})",
                step=number,
                kind="loss_spike",
            )
    state.recent_losses = [*before, report.loss][-HISTORY:]
