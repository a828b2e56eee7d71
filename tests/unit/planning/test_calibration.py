"""What a run took makes the next plan on this machine better, and the plan says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from foretune.artifacts import Cluster, Plan
from foretune.config import Config
from foretune.planning import Calibration, after_out_of_memory, make_plan, parse_hardware


def here(spec: str = "1xH100-80GB,ram=512GB") -> Cluster:
    return parse_hardware(spec).model_copy(update={"probed": True})


def plan_with(config: Config, calibration: Calibration | None, cluster: Cluster) -> Plan:
    return make_plan(config, model_folder="Qwen2.5-0.5B", cluster=cluster, prepared=None, calibration=calibration)


def test_the_next_plan_learns_and_says_so(config_of: Callable[..., Config], tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "calibration.json"
    config = config_of(plan={"zero_stage": 1, "compile": False})
    first = plan_with(config, Calibration(path), here())
    assert not any(decision.field == "calibration" for decision in first.decisions)
    assert Calibration(path).learn(first, step_seconds=1.5 * first.predicted.step_seconds, steps=50)
    second = plan_with(config, Calibration(path), here())
    assert second.predicted.step_seconds == pytest.approx(1.5 * first.predicted.step_seconds, rel=1e-3)
    said = next(decision for decision in second.decisions if decision.field == "calibration")
    assert "× 1.50" in said.reason
    assert str(path) in said.reason
    # A run that takes what the corrected plan said leaves the factor as it is.
    assert Calibration(path).learn(second, step_seconds=second.predicted.step_seconds, steps=50)
    assert Calibration(path).factor(here(), "full", 1) == pytest.approx(1.5, rel=1e-3)


def test_it_holds_for_this_accelerator_method_and_stage_alone(config_of: Callable[..., Config], tmp_path: Path) -> None:
    calibration = Calibration(tmp_path / "calibration.json")
    plan = plan_with(config_of(plan={"zero_stage": 1}), None, here())
    calibration.learn(plan, step_seconds=2 * plan.predicted.step_seconds, steps=50)
    assert calibration.factor(here(), "full", 2) == pytest.approx(2.0, rel=1e-3)
    assert calibration.factor(here(), "full", 3) == 1.0
    assert calibration.factor(here(), "lora", 1) == 1.0
    assert calibration.factor(here("1xA100-80GB"), "full", 1) == 1.0
    assert calibration.factor(parse_hardware("1xH100-80GB"), "full", 1) == 1.0  # described, not here


@pytest.mark.parametrize(("factor", "steps"), [(2.0, 3), (50.0, 100), (0.01, 100)])
def test_what_says_too_little_is_not_learned(
    config_of: Callable[..., Config], tmp_path: Path, factor: float, steps: int
) -> None:
    path = tmp_path / "calibration.json"
    plan = plan_with(config_of(), None, here())
    assert not Calibration(path).learn(plan, step_seconds=factor * plan.predicted.step_seconds, steps=steps)
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step_time": 3}', '{"step_time": {"a": ["x"]}}'])
def test_a_damaged_file_holds_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    assert Calibration(path).factor(here(), "full", 1) == 1.0


def test_a_cpu_is_not_calibrated(config_of: Callable[..., Config], tmp_path: Path) -> None:
    plan = plan_with(config_of(), None, here("2xcpu,ram=64GB"))
    learned = Calibration(tmp_path / "c.json").learn(plan, step_seconds=plan.predicted.step_seconds, steps=99)
    assert not learned


def test_nothing_is_learnt_from_a_plan_that_was_changed(config_of: Callable[..., Config], tmp_path: Path) -> None:
    calibration = Calibration(tmp_path / "calibration.json")
    plan = after_out_of_memory(plan_with(config_of(plan={"micro_batch_size_per_gpu": 4}), None, here()))
    assert plan is not None
    assert not calibration.learn(plan, step_seconds=2 * plan.predicted.step_seconds, steps=50)
