"""Query, key and value by one product, against the family's own code."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)  # fmt: skip
from zero_1_buffers import LAYERS, SMALL, assert_evaluates_as_plain, assert_trains_as_plain, sums_of

from foretune.model.fused_qkv import _reads_input_in_maps_only, fuse_qkv
from foretune.model.gated_mlp import fuse_mlps
from foretune.model.weight_sums import sum_inside
from foretune.planning.kernels import ONE_INPUT

FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "llama with biases": LlamaConfig(**SMALL, attention_bias=True),
    "mistral": MistralConfig(**SMALL, sliding_window=8),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),  # biases
    "qwen3": Qwen3Config(**SMALL, head_dim=8),  # norms between
    "gemma2": Gemma2Config(**SMALL, head_dim=8, sliding_window=8),
    "olmo2": Olmo2Config(**SMALL),  # norms over all heads
}
OTHERS = {
    "phi3": Phi3Config(**SMALL, pad_token_id=0),
    "neox": GPTNeoXConfig(**{**SMALL, "num_key_value_heads": 4}),
}


def test_families_that_it_is_planned_for_are_tried_here() -> None:
    assert set(FAMILIES) >= ONE_INPUT


@pytest.mark.parametrize("checkpointed", [0, 1, LAYERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_losses_and_sums(family: str, checkpointed: int) -> None:
    """fp32: another order of the same sums."""
    assert_trains_as_plain(FAMILIES[family], fuse_qkv, checkpointed=checkpointed)


@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.parametrize("checkpointed", [0, 1])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_compiled_layers_take_it_as_it_is(family: str, checkpointed: int) -> None:
    """One graph for all layers, without a break; beside MLPs that are fused.

    In fp64, since the parts of a key bias's gradient cancel: all of them are the same to fp32's last bit.
    """

    def both(model: object) -> int:
        assert fuse_mlps(model) == LAYERS
        return fuse_qkv(model)

    assert_trains_as_plain(
        FAMILIES[family], both, losses_within=1e-12, sums_within=2e-7, dtype=torch.float64, checkpointed=checkpointed,
        backend="aot_eager",
    )  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_other_attention_is_left_alone(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(OTHERS[family]), dtype=torch.float32)
    sum_inside(model, sums_of(model))
    assert fuse_qkv(model) == 0


def test_weights_apart_are_left_alone() -> None:
    """As parameters are before ZeRO lays them side by side; and without sums of their own."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["llama"]), dtype=torch.float32)
    assert fuse_qkv(model) == 0
    sums = sums_of(model)
    layer = model.model.layers[0].self_attn
    layer.k_proj.weight.data = layer.k_proj.weight.data.clone()
    sum_inside(model, sums)
    assert fuse_qkv(model) == LAYERS - 1


class Attention:
    """As a family might write it."""

    def reads_shape(self, hidden_states, mask):  # type: ignore[no-untyped-def]
        shape = hidden_states.shape[:-1]
        return self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states), self.v_proj(hidden_states), mask

    def reads_width(self, hidden_states):  # type: ignore[no-untyped-def]
        shape = hidden_states.shape
        return self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states), self.v_proj(hidden_states)

    def reads_it_again(self, hidden_states):  # type: ignore[no-untyped-def]
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states), hidden_states

    def changes_it(self, hidden_states):  # type: ignore[no-untyped-def]
        hidden_states = hidden_states + 1
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)

    def reads_a_weight(self, hidden_states):  # type: ignore[no-untyped-def]
        query = self.q_proj(hidden_states).to(self.q_proj.weight.dtype)
        return query, self.k_proj(hidden_states), self.v_proj(hidden_states)

    def shares_a_map(self, hidden_states):  # type: ignore[no-untyped-def]
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.k_proj(hidden_states)

    def may_leave_a_map(self, hidden_states, shared=None):  # type: ignore[no-untyped-def]
        key = shared if shared is not None else self.k_proj(hidden_states)
        return self.q_proj(hidden_states), key, self.v_proj(hidden_states)

    def calls_it_x(self, x):  # type: ignore[no-untyped-def]
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@pytest.mark.parametrize("name", [name for name in vars(Attention) if not name.startswith("_")])
def test_only_code_that_a_twin_can_run(name: str) -> None:
    kind = type("Kind", (), {"forward": vars(Attention)[name]})
    assert _reads_input_in_maps_only(kind) == (name == "reads_shape")


def test_evaluation_is_as_it_was_and_sees_new_weights() -> None:
    def change(layer: Any) -> None:
        layer.self_attn.q_proj.weight.mul_(2.0)
        layer.self_attn.o_proj.weight.mul_(2.0)

    assert_evaluates_as_plain(FAMILIES["qwen2"], fuse_qkv, change)
