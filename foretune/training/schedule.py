"""The learning rate of a step: a pure function, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    schedule: Literal["cosine", "linear", "constant"],
) -> float:
    """Learning rate of optimizer step `step` (from 0).

    Rises linearly over the first `warmup_steps` steps (step 0 already learns: peak / warmup_steps), then follows the
    schedule down to 0 at `total_steps`: cosine (Loshchilov and Hutter 2017, SGDR, without restarts), linear, or stays.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
