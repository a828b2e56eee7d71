"""Kernels as they were planned, and what is left of that where a model can't have them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from foretune.model import attention, compilation
from foretune.training.kernels import apply_compilation


@pytest.mark.parametrize("packed", [True, False])
def test_attention_that_is_not_packed_is_not_kept(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(compilation, "compile_layers", lambda model, **how: asked.update(how))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=67, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1)
    )
    if packed:
        attention.use_packed_attention(model)
    plan = SimpleNamespace(recompute_pointwise=True, keep_attention=True)
    assignment: Any = SimpleNamespace(plan=plan)
    apply_compilation(assignment, model)
    assert asked == {"recompute_pointwise": True, "keep_attention": packed}
