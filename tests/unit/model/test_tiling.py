"""MLPs in tiles against MLPs in one piece: loss and every gradient."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from foretune.config.schema import LoraConfig
from foretune.model.adapters import add_adapters
from foretune.model.loading import checkpoint_layers, override_dropout
from foretune.model.lora import fuse_adapters
from foretune.model.loss import attach_loss
from foretune.model.tiling import tile_mlps

VOCAB, LAYERS = 61, 2
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "gemma2, which normalises what the MLP gives": Gemma2Config(**SMALL, head_dim=8),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, initializer_range=0.3),
    "neox": GPTNeoXConfig(**{**SMALL, "num_key_value_heads": 4}),
}


def gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of 2 x 19 tokens, and all gradients by name."""
    ids = torch.randint(0, VOCAB, (2, 19), generator=torch.Generator().manual_seed(1))
    attach_loss(model, chunk_tokens=7)
    loss = model(input_ids=ids, shift_labels=ids.roll(-1, 1))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointed", [0, 1, LAYERS])
@pytest.mark.parametrize("family", CONFIGS)
def test_same_loss_and_gradients(family: str, checkpointed: int) -> None:
    """float64, 38 rows in tiles of 5: the last is shorter."""
    config = copy.deepcopy(CONFIGS[family])
    override_dropout(config, 0.0)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).double().train()
    tiled = copy.deepcopy(plain)
    checkpoint_layers(tiled, checkpointed)
    assert tile_mlps(tiled, 5) == LAYERS
    loss, grads = gradients(plain)
    tiled_loss, tiled_grads = gradients(tiled)
    torch.testing.assert_close(tiled_loss, loss, rtol=1e-12, atol=0)
    assert grads.keys() == tiled_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(tiled_grads[name], grad, rtol=1e-9, atol=1e-10, msg=name)


def test_adapters_inside_tiles() -> None:
    torch.manual_seed(0)
    plain = add_adapters(AutoModelForCausalLM.from_config(CONFIGS["llama"]), LoraConfig(r=4), seed=0).double().train()
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tiled = copy.deepcopy(plain)
    fuse_adapters(tiled)
    assert tile_mlps(tiled, 5) == LAYERS
    loss, grads = gradients(plain)
    tiled_loss, tiled_grads = gradients(tiled)
    torch.testing.assert_close(tiled_loss, loss)
    for name, grad in grads.items():
        torch.testing.assert_close(tiled_grads[name], grad, rtol=1e-9, atol=1e-10, msg=name)


def test_no_activation_of_all_rows_is_as_wide_as_the_mlp() -> None:
    """What autograd keeps, and what is made on the way: 38 rows of 48 exist without tiles, and not with them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Widest(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if (
                    isinstance(value, torch.Tensor)
                    and value.dim() >= 2
                    and value.shape[-1] == SMALL["intermediate_size"]
                ):
                    is_weight = value.numel() == 32 * 48
                    self.rows = max(self.rows, 0 if is_weight else value.numel() // 48)
            return out

    rows = {}
    for tile in (38, 5):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).train()
        checkpoint_layers(model, LAYERS)
        tile_mlps(model, tile)
        with Widest() as seen:
            gradients(model)
        rows[tile] = seen.rows
    assert rows == {38: 38, 5: 5}


def test_experts_and_dropout_are_left_alone() -> None:
    experts = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=2))
    assert tile_mlps(experts, 5) == 0
    assert tile_mlps(AutoModelForCausalLM.from_config(CONFIGS["gpt2"]), 5) == 0  # its own dropout is 0.1
