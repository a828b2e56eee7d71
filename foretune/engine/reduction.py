"""ZeRO 2 on a CPU: the gradients of a global batch cross the wire once, not once a micro-batch.

    micro-batches ──autograd──▶ one flat sum on every rank ──step──▶ all reduced once, each owner takes its partition

DeepSpeed 0.19.8 sends every gradient to its owner as backward makes it, and adds it up there; that saves the memory of
the parts that others own. Between the ranks of one host gloo moves about 1 GB/s and takes the cores that compute, so
the sums wait for the step: `engine.coalesce_grad_reduction()` is made for it, but refuses an engine whose caller owns
the boundary, as ours does. Its flag is used here, and gradients lie from the start where they are reduced from, in the
order of the partitions: nothing is copied into buckets, flattened or copied back.

Memory: whole gradients, b·ψt on every rank instead of b·ψt/N, as ZeRO 1 has them. Sums differ in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup


class ReductionAtStep:
    """Holds back the reductions of one DeepSpeed engine until its step."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._zero = engine, engine.optimizer
        self._sums = [torch.zeros_like(flat) for flat in self._zero.bit16_groups_flat]
        self._attached = False
        self._zero.finalize_gradient_accumulation_boundary = self._reduce

    @staticmethod
    def applies(engine: Any) -> bool:
        """Whether this engine reduces in every backward, and sums in the format that gradients come in.

        In another format (16 bits with fp32 sums) only the owner's sum has it: held back, sums would be rounded.
        """
        zero = engine.optimizer
        return (
            type(zero) is DeepSpeedZeroOptimizer
            and zero.partition_gradients
            and not zero.cpu_offload
            and not zero.has_moe_layers
            and zero.gradient_accumulation_dtype == zero.dtype
        )

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Within this, a backward pass adds to this rank's sums and tells no one."""
        if not self._attached:
            self._attach()
        self._hold(True)
        try:
            yield
        finally:
            self._hold(False)

    def _attach(self) -> None:
        """Let every gradient lie in the sums, as its parameter lies in the flat weights; from zero."""
        zero = self._zero
        for params, weights, sums in zip(zero.bit16_groups, zero.bit16_groups_flat, self._sums, strict=True):
            sums.zero_()
            for param in params:
                offset = (param.data_ptr() - weights.data_ptr()) // weights.element_size()
                param.grad = sums.narrow(0, offset, param.numel()).view(param.shape)
        self._attached = True

    def _reduce(self) -> None:
        """In place of DeepSpeed's end of a global batch: every owner has the average of its partition."""
        zero = self._zero
        if not self._attached:  # a step without a backward pass
            self._attach()
        self._attached = False
        zero.set_gradient_accumulation_boundary(True)
        for index, sums in enumerate(self._sums):
            group = zero.real_dp_process_group[index]
            ranks = comm.get_world_size(group=group)
            if ranks > 1:
                sums.div_(ranks)
                comm.all_reduce(sums, group=group)  # gloo takes longer to reduce each partition to its owner
            own = sums.chunk(ranks)[comm.get_rank(group=group)]
            # DeepSpeed takes the norm of at most as many pieces as there are parameters, each widened to fp64.
            pieces = own.chunk(max(1, len(zero.params_in_partition[index])))
            zero.averaged_gradients[index] = GradPartitionBufferGroup(list(pieces), own)
            zero.all_grad_tensors[index] = None

    def _hold(self, on: bool) -> None:
        self._engine.inside_no_sync_ctxt = on
        self._zero._coalesce_grad_reduction = on
