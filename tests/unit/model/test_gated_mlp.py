"""Gated MLPs with their activation inside the products, against the family's own code."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config, Qwen3Config
from zero_1_buffers import (
    LAYERS,
    SMALL,
    assert_close,
    assert_evaluates_as_plain,
    assert_trains_as_plain,
    sums_of,
    trained,
)  # fmt: skip

from foretune.model import gated_mlp, quack_kernels
from foretune.model.compilation import compiled_graphs, found_graphs
from foretune.model.fused_qkv import fuse_qkv
from foretune.model.gated_mlp import fuse_mlps
from foretune.model.weight_sums import GradientSum, sum_inside, sums_over

FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
}
OTHERS = {
    "llama with biases": LlamaConfig(**SMALL, mlp_bias=True),
    "llama with another activation": LlamaConfig(**SMALL, hidden_act="gelu"),
    "gemma2": Gemma2Config(**SMALL, head_dim=8),
    "neox": GPTNeoXConfig(**{**SMALL, "num_key_value_heads": 4}),
}


@pytest.mark.parametrize("checkpointed", [0, 1, LAYERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_losses_and_sums(family: str, checkpointed: int) -> None:
    """fp32: another order of the same sums."""
    assert_trains_as_plain(FAMILIES[family], fuse_mlps, checkpointed=checkpointed)


def test_16_bits_round_less_often() -> None:
    """Against fp32, the sums are no further away than those of the family's own code."""
    config = FAMILIES["llama"]
    _, wide = trained(config)
    _, plain = trained(config, dtype=torch.bfloat16)
    _, fused = trained(config, fuse=fuse_mlps, dtype=torch.bfloat16)
    errors = [
        sum(float((one[name] - wide[name]).norm() / wide[name].norm()) for name in wide) for one in (plain, fused)
    ]
    assert errors[1] < 1.05 * errors[0], errors


@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.parametrize("checkpointed", [0, 1])
def test_compiled_layers_take_it_as_it_is(checkpointed: int) -> None:
    """One graph for all layers, without a break at the operators."""
    assert_trains_as_plain(FAMILIES["qwen2"], fuse_mlps, checkpointed=checkpointed, backend="aot_eager")


@pytest.mark.filterwarnings("ignore")
def test_a_compiler_changes_the_sums_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own compiler, which lets an operator change copies where it can't tell that nobody else reads them.

    Compiled once more, what was traced is found on disk, though it calls functions that torch does not know.
    """
    from torch._dynamo.utils import counters

    written: list[torch.Tensor] = []
    add = GradientSum.add_product

    def noted(self: GradientSum, left: torch.Tensor, right: torch.Tensor) -> None:
        written.extend([self.total, self.filled])
        add(self, left, right)

    monkeypatch.setattr(GradientSum, "add_product", noted)
    found: list[tuple[list[float], dict[str, torch.Tensor]]] = []
    for backend in ("", "inductor", "inductor"):
        counters.clear()
        found.append(
            trained(FAMILIES["llama"], fuse=lambda model: fuse_qkv(model) and fuse_mlps(model), backend=backend)
        )
        stores = {one.untyped_storage().data_ptr() for one in found[-1][1].values()}
        totals = {one.untyped_storage().data_ptr() for one in written[::2]}
        assert totals == stores
        flags = {one.untyped_storage().data_ptr() for one in written[1::2]}
        assert len(flags) == 1
        written.clear()
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert_close(found[1][1], found[0][1], 5e-6)
    assert found[2][0] == found[1][0]
    assert found_graphs() == compiled_graphs() > 0


def test_the_kernels_get_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that they take: stand-ins that compute the same in torch. The first sum of a step overwrites."""
    overwritten: list[bool] = []

    def add(total: torch.Tensor, d_before: torch.Tensor, hidden: torch.Tensor, *, overwrite: bool) -> None:
        overwritten.append(overwrite)
        product = gated_mlp._apart(d_before).T @ hidden
        total.copy_(product) if overwrite else total.add_(product)

    plain = trained(FAMILIES["llama"], fuse=fuse_mlps)
    stand_ins = {
        "takes": lambda tensor: True,
        "gated": lambda hidden, joined: (
            before := gated_mlp._interleaved(hidden @ joined.T),
            gated_mlp._swiglu(before),
        ),
        "gated_backward": gated_mlp._gated_backward,
        "add_joined_gradient": add,
        "hidden_gradient": lambda d_before, joined: gated_mlp._apart(d_before) @ joined,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(quack_kernels, name, stand_in)
    losses, totals = trained(FAMILIES["llama"], fuse=fuse_mlps)
    assert losses == plain[0]
    assert_close(totals, plain[1], 0.0)
    assert overwritten == [True] * LAYERS + [False] * LAYERS


@pytest.mark.parametrize("family", OTHERS)
def test_other_mlps_are_left_alone(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(OTHERS[family]), dtype=torch.float32)
    sum_inside(model, sums_of(model))
    assert fuse_mlps(model) == 0


def test_weights_apart_are_left_alone() -> None:
    """As parameters are before ZeRO lays them side by side; and without sums of their own."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["llama"]), dtype=torch.float32)
    assert fuse_mlps(model) == 0
    parameters = list(model.parameters())
    totals = [torch.zeros(parameter.numel()) for parameter in parameters]
    sum_inside(model, dict(zip(parameters, sums_over(parameters, totals)[0], strict=True)))
    assert fuse_mlps(model) == 0


def test_evaluation_is_as_it_was_and_sees_new_weights() -> None:
    assert_evaluates_as_plain(FAMILIES["llama"], fuse_mlps, lambda layer: layer.mlp.gate_proj.weight.mul_(2.0))
