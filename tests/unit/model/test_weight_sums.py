"""Weight gradients that are added to their fp32 sums inside the product, against autograd's, added afterwards."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)
from zero_1_buffers import sums_of

from foretune.model import weight_sums
from foretune.model.compilation import compile_layers, compiled_graphs
from foretune.model.loading import checkpoint_layers, override_dropout
from foretune.model.loss import attach_loss
from foretune.model.weight_sums import GradientSum, SummedLinear, sum_inside, sums_over

VOCAB, LAYERS, MICRO_BATCHES = 61, 3, 3
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
#: family → its config, and how many linear maps of a layer add inside.
CONFIGS = {
    "llama": (LlamaConfig(**SMALL), 7),
    "qwen2, with biases": (Qwen2Config(**SMALL, tie_word_embeddings=True), 7),
    "gemma2": (Gemma2Config(**SMALL, head_dim=8), 7),
    "neox": (GPTNeoXConfig(**{**SMALL, "num_key_value_heads": 4}), 4),
    "mixtral, whose experts are stacks": (MixtralConfig(**SMALL, num_local_experts=4), 4),
    "gpt2, whose maps are transposed": (GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=4), 0),
}


def trained(
    model, sums: dict[torch.nn.Parameter, GradientSum], *, scale: float | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and sums of three micro-batches of 2 x 19 tokens; with a scale the loss is told it beforehand."""
    attach_loss(model, chunk_tokens=7)
    losses = []
    for seed in range(MICRO_BATCHES):
        ids = torch.randint(0, VOCAB, (2, 19), generator=torch.Generator().manual_seed(seed))
        loss = model(input_ids=ids, shift_labels=ids.roll(-1, 1), gradient_scale=scale)
        (loss * (scale or 1.0)).backward()
        losses.append(float(loss.detach()))
    return losses, {name: sums[p].total for name, p in model.named_parameters() if sums[p].filled}


def pair(family: str, checkpointed: int = 0) -> tuple[torch.nn.Module, torch.nn.Module]:
    config, _ = CONFIGS[family]
    config = copy.deepcopy(config)
    override_dropout(config, 0.0)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    inside = copy.deepcopy(plain)
    for model in (plain, inside):
        checkpoint_layers(model, checkpointed)
    return plain, inside


@pytest.mark.parametrize("checkpointed", [0, 1, LAYERS])
@pytest.mark.parametrize("family", CONFIGS)
def test_same_losses_and_sums(family: str, checkpointed: int) -> None:
    """On a CPU to the bit: it rounds the product to 16 bits before it adds, as autograd does.

    Of an embedding autograd also rounds the sum over a token's places, and of a tied one what comes of head and lookup.
    """
    plain, inside = pair(family, checkpointed)
    sums = sums_of(inside)
    assert sum_inside(inside, sums) == LAYERS * CONFIGS[family][1]
    losses, totals = trained(plain, sums_of(plain))
    inside_losses, inside_totals = trained(inside, sums)
    assert inside_losses == losses
    assert inside_totals.keys() == totals.keys()
    for name, total in totals.items():
        if total.shape[0] == VOCAB:
            torch.testing.assert_close(inside_totals[name], total, rtol=1e-2, atol=1e-2 * float(total.abs().max()))
        else:
            assert torch.equal(inside_totals[name], total), name


@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.parametrize("checkpointed", [0, 1])
@pytest.mark.parametrize("family", ["llama", "qwen2, with biases"])
def test_compiled_layers_share_one_graph(family: str, checkpointed: int) -> None:
    plain, inside = pair(family, checkpointed)
    sums = {plain: sums_of(plain), inside: sums_of(inside)}
    sum_inside(inside, sums[inside])
    graphs, totals = [], []
    for model, into in sums.items():
        torch._dynamo.reset()
        before = compiled_graphs()
        assert compile_layers(model, backend="aot_eager") == LAYERS
        totals.append(trained(model, into)[1])
        graphs.append(compiled_graphs() - before)
    assert graphs[1] == graphs[0] > 0, graphs
    for name, total in totals[0].items():
        torch.testing.assert_close(totals[1][name], total, rtol=1e-2, atol=1e-2 * float(total.abs().max()), msg=name)


@pytest.mark.parametrize("family", CONFIGS)
def test_both_ends_add_to_their_sums(family: str) -> None:
    """Embedding and head, tied or not; told the loss's scale, the head adds as it computes. fp32 against autograd."""
    scale = 1 / 37
    plain, inside = (model.float() for model in pair(family))
    taken: list[torch.Tensor | None] = []
    for module in (inside.get_input_embeddings(), inside.get_output_embeddings()):
        module.weight.register_post_accumulate_grad_hook(lambda parameter: taken.append(parameter.grad))
    sums = sums_of(inside)
    sum_inside(inside, sums)
    losses, totals = trained(plain, sums_of(plain), scale=None)
    inside_losses, inside_totals = trained(inside, sums, scale=scale)
    has_own_forward = type(inside.get_input_embeddings()) is not weight_sums.SummedEmbedding
    made = [gradient for gradient in taken if gradient is not None]
    assert bool(made) == has_own_forward  # autograd made none of them
    assert inside_losses == losses
    assert inside_totals.keys() == totals.keys()
    for name, total in totals.items():
        error = (inside_totals[name] - scale * total).norm() / (scale * total).norm()
        assert float(error) <= 1e-5, name  # where the scale comes in moves roundings; some gradients nearly cancel


def test_without_gradients_nothing_is_summed() -> None:
    _, model = pair("llama")
    attach_loss(model, chunk_tokens=7)
    sums = sums_of(model)
    sum_inside(model, sums)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        loss = model(input_ids=ids, shift_labels=ids, gradient_scale=0.1)
    assert not loss.requires_grad
    assert not any(one.filled for one in sums.values())


def test_another_scale_than_was_promised_is_noticed() -> None:
    _, model = pair("llama")
    attach_loss(model, chunk_tokens=7)
    sum_inside(model, sums_of(model))
    ids = torch.arange(12)[None]
    with pytest.raises(AssertionError, match="promised"):
        (model(input_ids=ids, shift_labels=ids, gradient_scale=0.1) * 0.2).backward()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_rows_are_summed_by_index(tokens: list[int]) -> None:
    index, rows = torch.tensor(tokens), torch.arange(len(tokens) * 2.0).reshape(-1, 2)
    into, sums = weight_sums.sums_by_index(index, rows, at_most=6)
    assert into.shape == index.shape
    expected = torch.zeros(6, 2).index_add(0, index, rows)
    torch.testing.assert_close(torch.zeros(6, 2).index_add(0, into, sums), expected)


def test_rows_without_use_have_no_gradient() -> None:
    table = weight_sums.SummedEmbedding(5, 2, padding_idx=1)
    (table.gradient_sum,), _ = sums_over([table.weight], [torch.full((10,), float("nan"))])
    table(torch.tensor([[0, 1, 0, 4]])).sum().backward()
    assert table.weight.grad is None
    assert table.gradient_sum.total.tolist() == [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]


def test_shared_weights_and_evaluation_are_left_alone() -> None:
    _, model = pair("llama")
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    sums = sums_of(model)
    assert sum_inside(model, sums) == 7 * LAYERS - 2
    assert type(model.lm_head) is torch.nn.Linear
    assert isinstance(layers[0].mlp.down_proj, SummedLinear)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        model(input_ids=ids)
    assert not any(one.filled for one in sums.values())
    assert set(model.state_dict()) == set(pair("llama")[0].state_dict())


def test_a_sum_is_overwritten_first() -> None:
    total = torch.full((3, 2), float("nan"))
    left, right = torch.randn(3, 5).bfloat16(), torch.randn(5, 2).bfloat16()
    weight_sums.add_product(total, left, right, overwrite=True)
    weight_sums.add_product(total, left, right)
    torch.testing.assert_close(total, 2 * (left @ right).float())
