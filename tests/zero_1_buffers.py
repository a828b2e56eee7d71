"""Weights and the sums of their gradients as ZeRO-1 with fp32 sums has them, without DeepSpeed."""

from __future__ import annotations

import torch

from foretune.model.weight_sums import GradientSum, sums_over


def sums_of(model: torch.nn.Module) -> dict[torch.nn.Parameter, GradientSum]:
    """Lay the weights side by side in one buffer, and give them sums in another, in fp32.

    The sums hold what an earlier step left there (NaN); autograd's gradients go there.
    """
    parameters = list(model.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    for parameter, piece in zip(parameters, weights.split(sizes), strict=True):
        parameter.data = piece.view(parameter.shape)
    totals = torch.full((sum(sizes),), float("nan"), device=weights.device).split(sizes)
    sums = dict(zip(parameters, sums_over(parameters, totals)[0], strict=True))
    for parameter, one in sums.items():
        parameter.register_post_accumulate_grad_hook(one.take)
    return sums
