"""Weights and the sums of their gradients as ZeRO-1 with fp32 sums has them, without DeepSpeed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from foretune.model.compilation import compile_layers, compiled_graphs
from foretune.model.loading import checkpoint_layers
from foretune.model.loss import attach_loss
from foretune.model.weight_sums import GradientSum, sum_inside, sums_over

#: A model of a few thousand parameters in any family; widths that differ, so that none is taken for another.
LAYERS = 3
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


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


def assert_trains_as_plain(
    config: PreTrainedConfig,
    fuse: Callable[[Any], int],
    *,
    losses_within: float = 1e-6,
    sums_within: float = 2e-6,
    **how: Any,
) -> None:
    """Losses and sums are those of the family's own code; compiled, as many graphs are made as of it."""
    runs, graphs = [], []
    for one in (None, fuse):
        before = compiled_graphs()
        runs.append(trained(config, fuse=one, **how))
        graphs.append(compiled_graphs() - before)
    assert graphs[0] == graphs[1]
    assert (graphs[0] > 0) == ("backend" in how)
    assert runs[1][0] == pytest.approx(runs[0][0], rel=losses_within)
    assert_close(runs[1][1], runs[0][1], sums_within)


def assert_evaluates_as_plain(
    config: PreTrainedConfig, fuse: Callable[[Any], int], change: Callable[[Any], object]
) -> None:
    """Without gradients to the bit, with them within rounding; it sees weights that change, under the same names."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    ids = torch.arange(19)[None]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    with torch.no_grad():
        before = model(ids).logits
        sum_inside(model, sums_of(model))
        assert fuse(model) == LAYERS
        assert torch.equal(model(ids).logits, before)
        change(model.model.layers[0])
        plain = model(ids).logits
    torch.testing.assert_close(model(ids).logits.detach(), plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, before)
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == names
