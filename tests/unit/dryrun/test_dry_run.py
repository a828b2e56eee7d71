"""The closed forms of the model states are what DeepSpeed's engine holds, for one rank and for many."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from forks import WarmProcess

from foretune import dryrun
from foretune.artifacts import Plan
from foretune.config import Config, parse_config
from foretune.dryrun import DryRun
from foretune.planning import make_plan, parse_hardware

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero3-16": ("2x8xA100-80GB", {"plan": {"zero_stage": 3}}),
    "streamed": ("1xH100", {"plan": {"offload_optimizer": 0.5, "offload_optimizer_step": "device"}}),
    "fp8": ("1xH100", {"allow_numerics": True, "plan": {"fp8": True}}),
    "8bit": ("2xH100", {"allow_numerics": True, "plan": {"optimizer_dtype": "8bit"}}),
}


def planned(hardware: str, values: dict[str, Any]) -> tuple[Plan, Config]:
    config = parse_config({"model": "pythia-70m", "data": "d", "train": {"max_length": 64}, **values})
    return make_plan(config, model_folder="pythia-70m", cluster=parse_hardware(hardware), prepared=None), config


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DryRun]:
    """Of all cases, by one process that imports once."""
    folders = {name: tmp_path_factory.mktemp(name) for name in CASES}
    plans = {name: planned(*case) for name, case in CASES.items()}
    for name, folder in folders.items():
        dryrun.lay_out(folder, *plans[name])
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here.parents[1])}  # where `forks` lies
    with WarmProcess(str(here / "forked_dry_runs.py"), environment) as process:
        for folder in folders.values():
            done = process.run(str(folder), environment=environment, timeout=500)
            assert done.returncode == 0, done.stderr[-4000:]
    return {name: dryrun.read(folder, *plans[name], seconds=0.0) for name, folder in folders.items()}


def check(found: DryRun) -> None:
    assert found.difference == pytest.approx(0.0, abs=0.005)
    assert found.agrees
    assert set(found.peaks) >= {"initialisation", "forward", "backward", "step"}
    assert found.peaks["forward"] > found.engine_bytes


def test_states_agree_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is compiled for it: DeepSpeed's collectives in shared memory would take a minute, the first time."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    plan, config = planned("8xH100", {"plan": {"zero_stage": 1}})
    check(dryrun.dry_run(plan, config))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", list(CASES))
def test_states_agree(results: dict[str, DryRun], case: str) -> None:
    check(results[case])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hardware", "values"),
    [
        ("8x8xA100-80GB", {"plan": {"zero_stage": 3}}),
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
    assert dryrun.dry_run(*planned(hardware, values)).agrees
