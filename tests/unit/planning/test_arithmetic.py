"""The lines of arithmetic add up to the prediction, part by part, and each has a formula of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from foretune.artifacts import Plan
from foretune.config import Config
from foretune.errors import NoPlanFits
from foretune.planning import make_plan, parse_hardware

MACHINES = ["1xH100-80GB,ram=125GB", "8xH100", "2xcpu,ram=64GB", "1xV100-32GB", "8x8xA100-80GB", "1xRTX4090,ram=96GB"]


@pytest.mark.parametrize("hardware", MACHINES)
@pytest.mark.parametrize("model", ["gpt2", "Qwen2.5-7B", "gemma-2-2b", "Llama-3.1-70B"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("stage", ["auto", 0, 3])
def test_lines_add_up(
    config_of: Callable[..., Config], hardware: str, model: str, method: str, stage: int | str
) -> None:
    config = config_of(method=method, plan={"zero_stage": stage})
    try:
        plan = make_plan(config, model_folder=model, cluster=parse_hardware(hardware), prepared=None)
    except Exception as error:
        assert isinstance(error, NoPlanFits) or "GiB" in str(error)  # noqa: PT017
        return
    add_up(plan)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("hardware", ["1xH100-80GB,ram=125GB", "1xcpu,ram=256GB"])
def test_lines_of_layers_that_recompute_long_rows_add_up(
    config_of: Callable[..., Config], hardware: str, method: str
) -> None:
    config = config_of(method=method, train={"max_length": 65536, "global_batch_size": 8},
                       plan={"checkpointed_layers": 28})  # fmt: skip
    plan = make_plan(config, model_folder="Qwen2.5-1.5B", cluster=parse_hardware(hardware), prepared=None)
    assert plan.predicted.peak_phase == "recomputation"
    add_up(plan)


def add_up(plan: Plan) -> None:
    sums: Counter[str] = Counter()
    for line in plan.arithmetic:
        sums[line.part] += line.value
        assert line.formula
        assert line.numbers
    assert sums == Counter(plan.predicted.gpu_memory_parts)
    unexplained = [line for line in plan.arithmetic if line.formula == "as measured" and abs(line.value) > 16]
    assert unexplained == []
