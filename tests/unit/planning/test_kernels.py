"""Attention and compiling: chosen with a reason, refused where they cannot be."""

import pytest

from foretune.artifacts import Plan
from foretune.config import load_config
from foretune.errors import UserError
from foretune.planning.hardware import parse_hardware
from foretune.planning.planner import make_plan


def plan(hardware: str, *settings: str, tokens: int = 100_000_000, model: str = "Qwen/Qwen2.5-0.5B") -> Plan:
    config = load_config(flags={"model": model, "data": "x.jsonl"}, settings=list(settings))
    return make_plan(config, model_folder=model, cluster=parse_hardware(hardware), prepared=None, tokens=tokens)


def reason_of(made: Plan, field: str) -> str:
    return next(decision.reason for decision in made.decisions if decision.field == field)


def test_a_gpu_gets_packed_attention_and_compiled_layers_when_it_asks() -> None:
    made = plan("1xH100-80GB", "plan.attention=packed", "plan.compile=true")
    assert made.attention == "packed"
    assert made.compile_layers
    usual = plan("1xH100-80GB")
    assert usual.attention == "sdpa"
    assert not usual.compile_layers
    assert "ask for" in reason_of(usual, "plan.attention")


def test_a_cpu_gets_neither() -> None:
    made = plan("2xcpu,ram=64GB", tokens=100_000)
    assert made.attention == "sdpa"
    assert not made.compile_layers
    assert "CUDA" in reason_of(made, "plan.attention")


@pytest.mark.parametrize(
    ("hardware", "settings", "field"),
    [
        ("2xcpu,ram=64GB", ["plan.attention=packed"], "plan.attention"),
        ("1xH100-80GB", ["plan.attention=packed", "train.precision=fp32"], "plan.attention"),
        ("1xH100-80GB", ["plan.attention=packed", "train.dropout=model"], "plan.attention"),
        ("2xcpu,ram=64GB", ["plan.compile=true"], "plan.compile"),
        ("1xH100-80GB", ["plan.compile=true", "plan.zero_stage=3"], "plan.compile"),
    ],
)
def test_what_cannot_be_is_refused(hardware: str, settings: list[str], field: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(hardware, *settings, tokens=1_000_000)
    assert caught.value.field == field
