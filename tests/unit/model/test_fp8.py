"""8-bit linear maps: close to what they stand for, and trained nearly as well."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from foretune.model.fp8 import Float8Linear, float8_linears
from foretune.model.loss import attach_loss

VOCAB = 64
CONFIG = LlamaConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("rows", [64, 61], ids=["whole tiles", "a weight gradient in bf16"])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e4], ids=["unit", "small", "large"])
def test_output_and_gradients_are_close(rows: int, size: float) -> None:
    """Norm-wise: e4m3 has 3 bits of mantissa, e5m2 two. Scaling keeps that at every magnitude."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(48, 80).to(torch.bfloat16)
    narrow = copy.deepcopy(plain)
    narrow.__class__ = Float8Linear
    x = (torch.randn(rows, 48) * size).to(torch.bfloat16)
    found = []
    for linear in (plain, narrow):
        inputs = x.clone().requires_grad_()
        output = linear(inputs)
        (output.float().square().sum() / size).backward()
        found.append((output.detach(), inputs.grad, linear.weight.grad))
    for a, b, bound in zip(found[1], found[0], (0.05, 0.08, 0.08), strict=True):
        assert 0 < relative(a, b) < bound


def test_without_gradients_it_is_what_will_be_exported() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(48, 80).to(torch.bfloat16)
    narrow = copy.deepcopy(plain)
    narrow.__class__ = Float8Linear
    x = torch.randn(5, 48).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(narrow(x), plain(x))
    assert not torch.equal(narrow(x), plain(x))


def test_only_the_layers_linears() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    assert float8_linears(model) == 2 * 7
    assert type(model.lm_head) is torch.nn.Linear


def test_it_learns_as_bf16_does() -> None:
    """60 steps of AdamW on a sequence that follows a rule: the last losses are within 3 % of bf16's."""
    torch.manual_seed(0)
    columns = [torch.randint(0, VOCAB, (60, 8))]
    for _ in range(32):
        columns.append((5 * columns[-1] + 7) % VOCAB)
    rows = torch.stack(columns, dim=-1)
    last = {}
    for name in ("bf16", "fp8"):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).train()
        if name == "fp8":
            float8_linears(model)
        attach_loss(model, chunk_tokens=512)
        master = [p.detach().float().requires_grad_() for p in model.parameters()]
        optimizer = torch.optim.AdamW(master, lr=3e-3)
        losses = []
        for row in rows:
            loss = model(input_ids=row[:, :-1], shift_labels=row[:, 1:]) / row[:, 1:].numel()
            loss.backward()
            for wide, p in zip(master, model.parameters(), strict=True):
                wide.grad, p.grad = p.grad.float(), None
            optimizer.step()
            for wide, p in zip(master, model.parameters(), strict=True):
                p.data.copy_(wide)
            losses.append(loss.item())
        last[name] = sum(losses[-10:]) / 10
        assert last[name] < losses[0] / 2, losses
    assert last["fp8"] == pytest.approx(last["bf16"], rel=0.03)
