"""Adam with 8-bit moments in a plan: when it is chosen, its memory, its refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foretune.artifacts import Plan
from foretune.config import Config
from foretune.errors import UserError
from foretune.planning import make_plan, parse_hardware
from foretune.planning.layout import work_and_strategy
from foretune.planning.planner import shape_for
from foretune.planning.predict import memory

MakeConfig = Callable[..., Config]
#: A host with no room for fp32 states: 7B in full, and nothing to stream from.
SMALL_HOST = "1xH100-80GB,ram=64GB,cores=16"
SEVEN_B = {"max_length": 4096, "global_batch_size": 32}
PARAMETERS = 7_615_616_512


def plan_of(config: Config, hardware: str = SMALL_HOST, *, model: str = "Qwen2.5-7B") -> Plan:
    return make_plan(config, model_folder=model, cluster=parse_hardware(hardware), prepared=None)


def test_7b_is_whole_on_one_card_of_80_gb(config_of: MakeConfig) -> None:
    plan = plan_of(config_of(train=SEVEN_B, allow_numerics=True))
    assert plan.optimizer_dtype == "8bit"
    assert plan.zero_stage == 1
    assert plan.gradient_accumulation_dtype == "fp32"
    assert plan.offload_optimizer == 0
    assert plan.sum_in_matmul
    assert plan.predicted.gpu_memory_bytes <= memory.budget(plan.cluster)
    assert plan.predicted.checkpoint_bytes == int((2 + 2.03125) * PARAMETERS)
    reason = next(one.reason for one in plan.decisions if one.field == "plan.optimizer_dtype")
    assert "changes numerics" in reason


def test_never_without_leave_nor_where_fp32_is_as_fast(config_of: MakeConfig) -> None:
    assert plan_of(config_of(train=SEVEN_B), "1xH100-80GB,ram=125GB,cores=16").optimizer_dtype == "fp32"
    allowed = config_of(train=SEVEN_B, allow_numerics=True)
    assert plan_of(allowed, "8xH100").optimizer_dtype == "fp32"
    assert plan_of(allowed, model="Qwen2.5-0.5B").optimizer_dtype == "fp32"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"allow_numerics": False}, "--allow-numerics"),
        ({"plan": {"zero_stage": 2}}, "ZeRO-1"),
        ({"plan": {"offload_optimizer": True}}, "offloaded"),
        ({"plan": {"gradient_accumulation_dtype": "bf16"}}, "fp32 sums"),
        ({"train": {"optimizer": "sgd"}}, "Adam"),
        ({"method": "lora"}, "adapters"),
        ({"train": {"precision": "fp32"}}, "bf16 weights"),
    ],
)
def test_refusals_say_why(config_of: MakeConfig, values: dict[str, Any], said: str) -> None:
    pins = {"optimizer_dtype": "8bit", **values.get("plan", {})}
    with pytest.raises(UserError, match=said) as error:
        plan_of(config_of(**{"allow_numerics": True, **values, "plan": pins}))
    assert error.value.field == "plan.optimizer_dtype"


def test_the_planner_knows_the_engines_pieces() -> None:
    from foretune.engine.states import eight_bits

    assert memory.EIGHT_BIT_PIECE == eight_bits.PIECE


def test_a_plan_survives_its_file(config_of: MakeConfig, tmp_path: Path) -> None:
    config = config_of(train=SEVEN_B, allow_numerics=True)
    plan = plan_of(config)
    plan.write(tmp_path / "plan.json")
    work, strategy = work_and_strategy(config, Plan.read(tmp_path / "plan.json"), shape_for("Qwen2.5-7B"))
    assert strategy.optimizer_dtype == "8bit"
    assert memory.device_memory(work, strategy, plan.cluster).peak == plan.predicted.gpu_memory_bytes
