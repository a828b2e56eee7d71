"""Query, key and value by one product, against the family's own code."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)  # fmt: skip
from zero_1_buffers import assert_close, sums_of, trained

from foretune.model.compilation import compiled_graphs
from foretune.model.fused_qkv import _reads_input_in_maps_only, fuse_qkv
from foretune.model.gated_mlp import fuse_mlps
from foretune.model.weight_sums import sum_inside

VOCAB, LAYERS = 61, 3
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "llama with biases": LlamaConfig(**SMALL, attention_bias=True),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),  # biases
    "qwen3": Qwen3Config(**SMALL, head_dim=8),  # norms between
    "gemma2": Gemma2Config(**SMALL, head_dim=8, sliding_window=8),
    "olmo2": Olmo2Config(**SMALL),  # norms over all heads
}
OTHERS = {
    "phi3": Phi3Config(**SMALL),
    "neox": GPTNeoXConfig(**{**SMALL, "num_key_value_heads": 4}),
}


@pytest.mark.parametrize("checkpointed", [0, 1, LAYERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_losses_and_sums(family: str, checkpointed: int) -> None:
    """fp32: another order of the same sums."""
    losses, totals = trained(FAMILIES[family], checkpointed=checkpointed)
    fused_losses, fused_totals = trained(FAMILIES[family], fuse=fuse_qkv, checkpointed=checkpointed)
    assert fused_losses == pytest.approx(losses, rel=1e-6)
    assert_close(fused_totals, totals, 2e-6)


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

    config = FAMILIES[family]
    graphs, runs = [], []
    for fuse in (None, both):
        before = compiled_graphs()
        runs.append(trained(config, fuse=fuse, dtype=torch.float64, checkpointed=checkpointed, backend="aot_eager"))
        graphs.append(compiled_graphs() - before)
    assert graphs[0] == graphs[1] > 0
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-12)
    assert_close(runs[1][1], runs[0][1], 2e-7)


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
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["qwen2"]), dtype=torch.float32).eval()
    ids = torch.arange(19)[None]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    with torch.no_grad():
        before = model(ids).logits
        sum_inside(model, sums_of(model))
        assert fuse_qkv(model) == LAYERS
        assert torch.equal(model(ids).logits, before)
        model.model.layers[0].self_attn.q_proj.weight.mul_(2.0)
        model.model.layers[0].self_attn.o_proj.weight.mul_(2.0)
        plain = model(ids).logits
    torch.testing.assert_close(model(ids).logits.detach(), plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, before)
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == names
