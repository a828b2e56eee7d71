"""Kernels as they were planned, and what is left of that where a model can't have them."""

from __future__ import annotations

import gc
import threading
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from foretune.model import attention, compilation
from foretune.training import kernels
from foretune.training.kernels import apply_compilation, apply_weight_sums, importing_kernels


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_planned_kernels_are_imported_beside_what_is_done(
    compiled: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are there afterwards, also where what is done fails."""
    go_on, imported = threading.Event(), []

    def imports(name: str) -> bool:
        assert go_on.wait(10)
        imported.append((name, threading.current_thread() is threading.main_thread(), gc.isenabled()))
        return False

    monkeypatch.setattr(kernels.quack_kernels, "refusal", lambda device: imports("quack"))
    monkeypatch.setattr(kernels.flash_attention_4, "is_there", lambda device: imports("flash"))
    plan: Any = SimpleNamespace(compile_layers=compiled, attention="packed" if packed else "sdpa", zero_stage=1)
    with suppress(KeyError), importing_kernels(plan, torch.device("cpu")):
        assert not imported
        go_on.set()
        raise KeyError
    assert imported == [(name, False, False) for name, one in (("quack", compiled), ("flash", packed)) if one]
    assert gc.isenabled()


def test_at_stage_3_they_are_there_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """While ZeRO-3 loads a model, modules' classes are changed. In the first step it would be too late: jax, which the
    libraries import where it is installed, draws from numpy's generator, and a checkpoint has set that by then."""
    imported: list[str] = []
    monkeypatch.setattr(kernels.quack_kernels, "refusal", lambda device: imported.append("quack"))
    monkeypatch.setattr(kernels.flash_attention_4, "is_there", lambda device: imported.append("flash"))
    plan: Any = SimpleNamespace(compile_layers=False, attention="packed", zero_stage=3)
    with importing_kernels(plan, torch.device("cpu")):
        assert imported == ["flash"]
    assert gc.isenabled()


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
    plan = SimpleNamespace(recompute_pointwise=True, keep_attention=True, fused_qkv=False)
    assignment: Any = SimpleNamespace(plan=plan)
    apply_compilation(assignment, model)
    assert asked == {"recompute_pointwise": True, "keep_attention": packed}


@pytest.mark.parametrize(("planned", "fused", "told"), [(False, 0, 0), (True, 3, 0), (True, 2, 1)])
def test_query_key_and_value_are_one_product_as_planned(
    planned: bool, fused: int, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before layers are compiled; where it cannot be, the run says so."""
    calls: list[str] = []
    monkeypatch.setattr(kernels, "decoder_layers", lambda model: [None] * 3)
    monkeypatch.setattr(kernels, "fuse_qkv", lambda model: calls.append("fused") or fused)
    monkeypatch.setattr(kernels.attention, "takes_bounds", lambda model: False)
    monkeypatch.setattr(compilation, "compile_layers", lambda model, **how: calls.append("compiled"))
    notes: list[str] = []
    plan = SimpleNamespace(recompute_pointwise=True, keep_attention=False, fused_qkv=planned)
    assignment: Any = SimpleNamespace(plan=plan, tell=lambda kind, message: notes.append(message))
    apply_compilation(assignment, None)
    assert calls == (["fused", "compiled"] if planned else ["compiled"])
    assert len(notes) == told


@pytest.mark.parametrize(
    ("planned", "tiles", "refusal", "fused", "told"),
    [
        (True, 0, None, 3, ""),
        (True, 0, None, 2, "1 of 3 compute something else"),
        (True, 0, "not installed", 0, "not installed"),
        (False, 0, None, 0, ""),
        (True, 512, None, 0, ""),
    ],
)
def test_mlps_are_fused_as_planned(
    monkeypatch: pytest.MonkeyPatch, *, planned: bool, tiles: int, refusal: str | None, fused: int, told: str
) -> None:
    """Over sums inside products; where it cannot be, or not of all layers, the run says so."""
    calls: list[str] = []
    monkeypatch.setattr(kernels, "sum_inside", lambda model, sums: calls.append("sums"))
    monkeypatch.setattr(kernels, "decoder_layers", lambda model: [None] * 3)
    monkeypatch.setattr(kernels, "fuse_mlps", lambda model: calls.append("mlps") or fused)
    monkeypatch.setattr(kernels.quack_kernels, "refusal", lambda device: refusal)
    notes: list[str] = []
    plan = SimpleNamespace(sum_in_matmul=True, mlp_tile_rows=tiles, fused_mlp=planned)
    assignment: Any = SimpleNamespace(plan=plan, tell=lambda kind, message: notes.append(message))
    engine: Any = SimpleNamespace(gradient_sums={}, device=torch.device("cpu"))
    apply_weight_sums(assignment, None, engine)
    assert calls == ([] if tiles else ["sums", "mlps"] if planned and refusal is None else ["sums"])
    assert len(notes) == bool(told)
    assert told in "".join(notes)
