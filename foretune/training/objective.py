"""Batch → loss. The mean over the target tokens of the *global* batch, whatever the layout.

DeepSpeed averages the gradients of the ranks, so one rank's share of the loss is scaled by the number of ranks:

    loss of a micro-batch = Σ nll · world_size / target tokens of the global batch

Summed over micro-batches and averaged over ranks, that is Σ nll / target tokens: no mean of means, which would weigh a
short answer in a sparse micro-batch more than a long one in a dense one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foretune.artifacts import IGNORE_INDEX
from foretune.data import MicroBatch
from foretune.engine import Engine
from foretune.model.attention import document_bounds


def to_device(micro_batch: MicroBatch, device: torch.device) -> dict[str, torch.Tensor]:
    """The model's inputs: input_ids, position_ids, shift_labels int64 [rows, length], target_index int64 [targets].

    On a GPU also document_bounds int32 [documents + 1] and, on the host, longest_document int64 []: see
    `foretune.model.attention`.

    There is no attention mask on purpose: restarting position ids alone isolate packed documents in transformers; an
    all-ones mask switches that isolation off silently.
    """
    arrays: dict[str, NDArray[Any]] = {
        "input_ids": micro_batch.input_ids,
        "position_ids": micro_batch.position_ids,
        "shift_labels": micro_batch.shift_labels,
        "target_index": np.flatnonzero(micro_batch.shift_labels.reshape(-1) != IGNORE_INDEX),
    }
    if device.type == "cpu":
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    bounds, longest = document_bounds(micro_batch.position_ids)
    arrays["document_bounds"] = bounds
    # One page-locked buffer and one copy, which the host does not wait for.
    sizes = [array.size for array in arrays.values()]
    buffer = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=True)
    np.concatenate([array.reshape(-1) for array in arrays.values()], out=buffer.numpy())
    parts = torch.split(buffer.to(device, non_blocking=True), sizes)
    tensors = {name: part.view(arrays[name].shape) for name, part in zip(arrays, parts, strict=True)}
    tensors["document_bounds"] = tensors["document_bounds"].to(torch.int32)
    tensors["longest_document"] = torch.tensor(longest)
    return tensors


def negative_log_likelihood(
    engine: Engine, inputs: dict[str, Any], *, gradient_scale: float | None = None
) -> torch.Tensor:
    """Forward one micro-batch: Σ nll over its targets, a scalar in float32 that can be differentiated.

    Args:
        gradient_scale: what it will be multiplied by before its backward pass, if there is one.
    """
    result: torch.Tensor = engine(**inputs, gradient_scale=gradient_scale)
    return result


def share_of_mean(*, world_size: int, target_tokens: int) -> float:
    """What makes of Σ nll a micro-batch's and rank's share of the global mean loss, see the head of this file."""
    return world_size / target_tokens
