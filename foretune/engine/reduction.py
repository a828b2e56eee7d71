"""ZeRO 2 on a CPU: the gradients of a global batch cross the wire once, not once a micro-batch.

    micro-batches ──autograd──▶ sums in `param.grad` (this rank's)  ──step──▶ reduced to their owners, once

DeepSpeed 0.19.8 sends every gradient to its owner as backward makes it, and adds it up there; that saves the memory of
the parts that others own. Between the ranks of one host gloo moves about 1 GB/s and takes the cores that compute, so
the sums wait for the step: `engine.coalesce_grad_reduction()` is made for it, but refuses an engine whose caller owns
the boundary, as ours does. Its parts are used here: the flag that its hooks look at, and its flush.

Memory: whole gradients, b·ψt on every rank instead of b·ψt/N, as ZeRO 1 has them. Sums differ in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class ReductionAtStep:
    """Holds back the reductions of one DeepSpeed engine until `flush`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    @staticmethod
    def applies(engine: Any) -> bool:
        """Whether this engine reduces in every backward, and sums in the format that gradients come in.

        In another format (16 bits with fp32 sums) only the owner's sum has it: held back, sums would be rounded.
        """
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        zero = engine.optimizer
        return (
            type(zero) is DeepSpeedZeroOptimizer
            and zero.partition_gradients
            and not zero.cpu_offload
            and zero.gradient_accumulation_dtype == zero.dtype
        )

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Within this, a backward pass adds to `param.grad` and tells no one."""
        self._hold(True)
        try:
            yield
        finally:
            self._hold(False)

    def flush(self) -> None:
        """Reduce what has been summed; right before the engine's step."""
        self._engine._flush_coalesced_reduction_zero12(self._engine.optimizer)

    def _hold(self, on: bool) -> None:
        self._engine.inside_no_sync_ctxt = on
        self._engine.optimizer._coalesce_grad_reduction = on
