"""The closed forms of the model states are what DeepSpeed's engine holds, for one rank and for many."""

from __future__ import annotations

from typing import Any

import pytest

from foretune.config import parse_config
from foretune.dryrun import DryRun, dry_run
from foretune.planning import make_plan, parse_hardware


def confirmed(hardware: str, **values: Any) -> DryRun:
    config = parse_config({"model": "pythia-70m", "data": "d", "train": {"max_length": 64}, **values})
    plan = make_plan(config, model_folder="pythia-70m", cluster=parse_hardware(hardware), prepared=None)
    return dry_run(plan, config)


@pytest.mark.parametrize(
    ("hardware", "values"),
    [
        ("8xH100", {"plan": {"zero_stage": 1}}),
        ("8x8xA100-80GB", {"plan": {"zero_stage": 3}}),
        ("1xH100", {"plan": {"offload_optimizer": 0.5, "offload_optimizer_step": "device"}}),
        ("1xH100", {"allow_numerics": True, "plan": {"fp8": True}}),
        ("2xH100", {"allow_numerics": True, "plan": {"optimizer_dtype": "8bit"}}),
    ],
    ids=["zero1-8", "zero3-64", "streamed", "fp8", "8bit"],
)
def test_states_agree(hardware: str, values: dict[str, Any]) -> None:
    found = confirmed(hardware, **values)
    assert found.difference == pytest.approx(0.0, abs=0.005)
    assert found.agrees
    assert set(found.peaks) >= {"initialisation", "forward", "backward", "step"}
    assert found.peaks["forward"] > found.engine_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hardware", "values"),
    [
        ("1xH100", {"plan": {"zero_stage": 2}}),
        ("4xH100", {"plan": {"zero_stage": 0}}),
        ("1xV100-32GB", {"plan": {"zero_stage": 2}}),
        ("2xcpu", {"plan": {"zero_stage": 2}}),
        ("8xH100", {"method": "lora", "plan": {"zero_stage": 2}}),
        ("8xH100", {"method": "lora", "plan": {"zero_stage": 3}}),
        ("2xH100", {"plan": {"zero_stage": 2, "offload_optimizer": True}}),
        ("2xH100", {"plan": {"zero_stage": 3, "offload_optimizer": 0.5}}),
        ("2xH100", {"allow_numerics": True, "plan": {"zero_stage": 2, "optimizer_dtype": "bf16"}}),
        ("2xH100", {"allow_numerics": True, "plan": {"zero_stage": 3, "optimizer_dtype": "bf16"}}),
    ],
    ids=str,
)
def test_more_states_agree(hardware: str, values: dict[str, Any]) -> None:
    assert confirmed(hardware, **values).agrees
