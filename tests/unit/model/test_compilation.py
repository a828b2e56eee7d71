"""Compiled layers that recompute inside their backward: what is made again, and that gradients stay what they are."""

import copy
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Olmo2Config, PreTrainedConfig

from foretune.model.compilation import compile_layers
from foretune.model.loading import checkpoint_layers
from foretune.model.tiling import tile_mlps

SIZES = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
GPT2 = GPT2Config(
    vocab_size=67, n_embd=32, n_layer=3, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0,
    attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
)  # fmt: skip
#: torch's compiler looks at every tensor's .grad, and says so; of these backends it says more.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).double().train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 67, (2, 24))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


class CountingBackend:
    """A backend of torch's compiler that runs graphs as they are, and counts the products of the backward ones."""

    def __init__(self) -> None:
        self.backward: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
        from torch._dynamo.backends.common import aot_autograd
        from torch._inductor.decomposition import select_decomp_table

        def count(piece: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
            names = Counter(str(node.target) for node in piece.graph.nodes if node.op == "call_function")
            self.backward.append(sum(names[f"aten.{name}.default"] for name in ("mm", "addmm")))
            return make_boxed_func(piece.forward)

        compile_both = aot_autograd(
            fw_compiler=lambda piece, _: make_boxed_func(piece.forward), bw_compiler=count,
            partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table(),
        )  # fmt: skip
        return compile_both(graph, inputs)


@pytest.mark.parametrize(
    ("config", "products", "again"),
    [(LlamaConfig(**SIZES), 7, 6), (Olmo2Config(**SIZES), 7, 7), (GPT2, 4, 3)],
    ids=["llama", "norm-after-the-mlp", "gpt2"],
)
def test_all_but_the_last_product_are_made_again(config: PreTrainedConfig, products: int, again: int) -> None:
    plain, recomputing, backend = make(config), make(config), CountingBackend()
    checkpoint_layers(recomputing, 2)
    assert compile_layers(recomputing, keep_attention=True, backend=backend) == 3  # type: ignore[arg-type]
    expected, found = gradients(plain), gradients(recomputing)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    # One graph of the layers that recompute, one of the other: each product has two gradients.
    assert sorted(backend.backward) == [2 * products, 2 * products + again]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_dropout_draws_the_same_numbers_again(backend: str) -> None:
    """The loss is taken linear in the last product's weight W: it is <W, its gradient> only if both saw one mask."""
    model = make(GPT2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    checkpoint_layers(model, 3)
    compile_layers(model, keep_attention=True, backend=backend)
    layer = model.transformer.h[2]
    weight = layer.mlp.c_proj.weight
    hidden, direction = torch.randn(2, 2, 24, 32, dtype=torch.float64).unbind()
    hidden.requires_grad_()

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        output = layer(hidden)
        return ((output[0] if isinstance(output, tuple) else output) * direction).sum()

    whole = loss()
    (gradient,) = torch.autograd.grad(whole, weight)
    with torch.no_grad():
        product = (weight * gradient).sum()
        weight.zero_()
    torch.testing.assert_close(product, whole - loss(), rtol=1e-8, atol=1e-8)


def test_layers_with_tiles_recompute_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, **how: compiled.append(run) or real(run, **how))
    plain, tiled = make(LlamaConfig(**SIZES)), make(LlamaConfig(**SIZES))
    assert tile_mlps(tiled, 16) == 3
    checkpoint_layers(tiled, 3)
    compile_layers(tiled, keep_attention=True, backend="aot_eager")
    assert [isinstance(run, partial) for run in compiled] == [False], "it recomputes inside what is compiled"
    expected, found = gradients(plain), gradients(tiled)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
