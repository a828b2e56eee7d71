"""Weights and the sums of their gradients as ZeRO-1 with fp32 sums has them, without DeepSpeed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from foretune.model.compilation import compile_layers
from foretune.model.loading import checkpoint_layers
from foretune.model.loss import attach_loss
from foretune.model.weight_sums import GradientSum, sum_inside, sums_over


def sums_of(model: torch.nn.Module) -> dict[torch.nn.Parameter, GradientSum]:
    """Lay the weights side by side in one buffer, matrices before vectors, and give them sums in another, in fp32.

    The sums hold what an earlier step left there (NaN); autograd's gradients go there.
    """
    parameters = sorted(model.parameters(), key=lambda parameter: parameter.ndim < 2)
    sizes = [parameter.numel() for parameter in parameters]
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    for parameter, piece in zip(parameters, weights.split(sizes), strict=True):
        parameter.data = piece.view(parameter.shape)
    totals = torch.full((sum(sizes),), float("nan"), device=weights.device).split(sizes)
    sums = dict(zip(parameters, sums_over(parameters, totals)[0], strict=True))
    for parameter, one in sums.items():
        parameter.register_post_accumulate_grad_hook(one.take)
    return sums


def trained(
    config: PreTrainedConfig,
    *,
    fuse: Callable[[Any], int] | None = None,
    dtype: torch.dtype = torch.float32,
    checkpointed: int = 0,
    backend: str = "",
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and sums by name of two micro-batches of 2 x 19 tokens.

    Args:
        fuse: changes as many modules as there are layers.
        backend: of torch's compiler, or none.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).train()
    checkpoint_layers(model, checkpointed)
    sums = sums_of(model)
    sum_inside(model, sums)
    if fuse is not None:
        assert fuse(model) == config.num_hidden_layers
    attach_loss(model, chunk_tokens=7)
    if backend:
        torch._dynamo.reset()
        assert compile_layers(model, recompute_pointwise=True, backend=backend) == config.num_hidden_layers
    losses = []
    for seed in range(2):
        ids = torch.randint(0, config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(seed))
        loss = model(input_ids=ids, shift_labels=ids.roll(-1, 1))
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, {name: sums[p].total for name, p in model.named_parameters() if sums[p].filled}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], share: float) -> None:
    """Every sum within a share of its largest element."""
    assert found.keys() == wanted.keys()
    for name, total in wanted.items():
        torch.testing.assert_close(found[name], total, rtol=0, atol=share * float(total.abs().max()), msg=name)
