"""The optimizer in host memory that passes through the device: when it is chosen, its memory and time, its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foretune.artifacts import Plan
from foretune.config import Config
from foretune.errors import UserError
from foretune.planning import after_out_of_memory, make_plan, parse_hardware
from foretune.planning.layout import work_and_strategy
from foretune.planning.planner import shape_for
from foretune.planning.predict import host, memory, timing, updating
from foretune.planning.search import evaluate

MakeConfig = Callable[..., Config]
ONE_H100 = "1xH100-80GB,ram=125GB,cores=16"
SEVEN_B = {"max_length": 4096, "global_batch_size": 16}
#: As it ran on one H100 (24 November 2026): 4 x 4 rows of 4096, all layers recomputed, 85 % in host memory.
MEASURED = {
    "micro_batch_size_per_gpu": 4,
    "checkpointed_layers": 28,
    "loss_chunk_tokens": 2048,
    "offload_optimizer": 0.85,
    "offload_optimizer_step": "device",
    "sum_in_matmul": False,
    "keep_attention": False,
}
PARAMETERS = 7_615_616_512


def plan_of(config: Config, hardware: str = ONE_H100, *, model: str = "Qwen2.5-7B") -> Plan:
    return make_plan(config, model_folder=model, cluster=parse_hardware(hardware), prepared=None)


def reason_of(plan: Plan, field: str) -> str:
    return next(one.reason for one in plan.decisions if one.field == field)


def test_7b_on_one_80_gb_card_is_streamed(config_of: MakeConfig) -> None:
    """Enough of the optimizer leaves the device that a row at a time needs no layer recomputed."""
    plan = plan_of(config_of(train=SEVEN_B))
    assert (plan.zero_stage, plan.offload_optimizer_step, plan.compile_layers) == (1, "device", True)
    assert 0.8 <= plan.offload_optimizer < 0.9
    assert (plan.micro_batch_size_per_gpu, plan.checkpointed_layers, plan.recompute_pointwise) == (1, 0, True)
    assert plan.predicted.tokens_per_second > 8000
    assert plan.predicted.gpu_memory_bytes <= memory.budget(plan.cluster)
    assert plan.predicted.host_memory_bytes_per_node <= host.host_budget(plan.cluster)
    assert "offload_optimizer" not in plan.deepspeed_config["zero_optimization"]
    assert plan.strategy_name == f"ZeRO-1 + {plan.offload_optimizer:.0%} of the optimizer streamed from host memory"
    assert "no room for a copy" in reason_of(plan, "checkpoint")
    assert "too small" in reason_of(plan, "plan.offload_optimizer")
    by_deepspeed = next(lost for lost in plan.rejected if lost.name.startswith("ZeRO-3 + "))
    assert by_deepspeed.prediction is not None
    assert "fits, but takes" in by_deepspeed.reason


@pytest.mark.parametrize("model", ["Llama-3.1-8B", "Qwen3-8B"])
def test_8b_on_one_80_gb_card_too(config_of: MakeConfig, model: str) -> None:
    """With master weights made on the device, building the engine alone took 10 bytes a parameter: more than it has."""
    plan = plan_of(config_of(train=SEVEN_B), model=model)
    assert plan.streams_optimizer
    assert plan.predicted.gpu_memory_bytes <= memory.budget(plan.cluster)


def test_no_other_batch_depth_or_share_is_faster(config_of: MakeConfig) -> None:
    """Every micro-batch, number of layers and share in hundredths, tried one by one."""
    config = config_of(train=SEVEN_B)
    plan = plan_of(config)
    work, chosen = work_and_strategy(config, plan, shape_for("Qwen2.5-7B"))
    every = (
        evaluate(work, replace(chosen, micro_batch_size=rows, accumulation_steps=16 // rows, checkpointed_layers=layers,
                               offload_optimizer=share / 100), plan.cluster)
        for rows in (1, 2, 4, 8) for layers in range(0, 29, 2) for share in range(60, 101, 2)
    )  # fmt: skip
    least = min(one.seconds for one in every if one.fits)
    assert evaluate(work, chosen, plan.cluster).seconds <= 1.02 * least


def test_memory_and_time_as_measured(config_of: MakeConfig) -> None:
    config = config_of(train=SEVEN_B, plan=MEASURED)
    work, strategy = work_and_strategy(config, plan_of(config), shape_for("Qwen2.5-7B"))
    cluster = parse_hardware(ONE_H100)
    # Before a save has made the states whole there: the share, and the process.
    running = host.GPU_PROCESS_BYTES + 0.85 * 12 * PARAMETERS
    assert running == pytest.approx(80_081_510_400, rel=0.03)
    time = timing.step_time(work, strategy, cluster)
    assert time.offload + time.optimizer == pytest.approx(1.828, rel=0.03)
    assert time.total == pytest.approx(8.33, rel=0.05)
    assert updating.starting_seconds(work, strategy, cluster) == pytest.approx(26.7 - 1.8, rel=0.05)


def test_the_planner_knows_the_engines_pieces() -> None:
    from foretune.engine.states import streaming

    assert (memory.STREAMED_PIECE, memory.STREAMED_SLOTS) == (streaming.PIECE, streaming.SLOTS)


def test_all_states_count_on_the_host_whatever_the_share(config_of: MakeConfig) -> None:
    """A save makes partitions whole there."""
    for share in (0.8, 1.0):
        plan = plan_of(config_of(train=SEVEN_B, plan={**MEASURED, "offload_optimizer": share}))
        assert plan.predicted.host_memory_parts["optimizer"] == 12 * PARAMETERS
        assert plan.predicted.checkpoint_bytes == 14 * PARAMETERS


def test_a_snapshot_is_made_where_memory_has_room(config_of: MakeConfig) -> None:
    plan = plan_of(config_of(train=SEVEN_B), "1xH100-80GB,ram=256GB,cores=16")
    assert plan.streams_optimizer
    assert plan.predicted.host_memory_parts["snapshot of a checkpoint"] == 14 * PARAMETERS
    assert "behind training" in [one.value for one in plan.decisions if one.field == "checkpoint"]


def test_several_ranks_share_partitions_and_the_hosts_memory(config_of: MakeConfig) -> None:
    config = config_of(train=SEVEN_B, plan={"offload_optimizer": 0.5, "zero_stage": 1})
    plan = plan_of(config, "2xH100,ram=512GB")
    assert plan.streams_optimizer
    shard = PARAMETERS // 2
    assert plan.predicted.host_memory_parts["optimizer"] == pytest.approx(2 * 12 * shard)
    work, strategy = work_and_strategy(config, plan, shape_for("Qwen2.5-7B"))
    parts = memory.phases(work, strategy, plan.cluster)["step"]
    assert parts["optimizer"] == pytest.approx(0.5 * 12 * shard)
    assert parts["gradients"] == 4 * PARAMETERS
    eight = timing.step_time(work, strategy, parse_hardware("8xH100,ram=2TB"))
    alone = timing.step_time(work, strategy, parse_hardware("1xH100,ram=2TB"))
    assert eight.offload > alone.offload / 8  # eight links together ask for more than the host's memory gives


def test_the_pages_are_locked_once(config_of: MakeConfig) -> None:
    plan = plan_of(config_of(train={**SEVEN_B, "max_steps": 10}))
    once = plan.predicted.total_seconds - 10 * plan.predicted.step_seconds
    assert 20 < once < 35


def test_it_is_not_used_where_all_fits(config_of: MakeConfig) -> None:
    assert plan_of(config_of(), "1xH100,ram=512GB", model="Qwen2.5-0.5B").offload_optimizer == 0
    assert plan_of(config_of(train=SEVEN_B), "8xH100").offload_optimizer == 0


@pytest.mark.parametrize(
    ("hardware", "values", "said"),
    [
        ("2xcpu,ram=1TB", {}, "no device to pass through"),
        (ONE_H100, {"method": "lora"}, "adapters are small"),
        (ONE_H100, {"train": {"precision": "fp16"}}, "bf16 weights and fp32 sums"),
        (ONE_H100, {"plan": {"gradient_accumulation_dtype": "bf16"}}, "bf16 weights and fp32 sums"),
        (ONE_H100, {"train": {"optimizer": "sgd"}}, "written for Adam"),
        (ONE_H100, {"plan": {"zero_stage": 3}}, "written for ZeRO-1"),
        (ONE_H100, {"plan": {"offload_optimizer": False}}, "plan.offload_optimizer is false"),
        (ONE_H100, {"plan": {"offload_param": True}}, "ZeRO-3 only"),
    ],
)
def test_refusals_say_why(config_of: MakeConfig, hardware: str, values: dict[str, Any], said: str) -> None:
    pins = {**values.get("plan", {}), "offload_optimizer_step": "device"}
    with pytest.raises(UserError, match=said) as error:
        plan_of(config_of(**{**values, "plan": pins}), hardware)
    assert error.value.field == "plan.offload_optimizer_step"


def test_a_plan_survives_its_file(config_of: MakeConfig, tmp_path: Path) -> None:
    plan = plan_of(config_of(train=SEVEN_B))
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    work, strategy = work_and_strategy(config_of(train=SEVEN_B), plan, shape_for("Qwen2.5-7B"))
    assert strategy.streamed
    assert memory.device_memory(work, strategy, plan.cluster).peak == plan.predicted.gpu_memory_bytes
    older = json.loads(plan.model_dump_json())
    del older["offload_optimizer_step"]
    assert not Plan.model_validate(older).streams_optimizer


def test_after_out_of_memory_more_is_streamed_last(config_of: MakeConfig) -> None:
    plans = [plan_of(config_of(train=SEVEN_B, plan={**MEASURED, "micro_batch_size_per_gpu": 1}))]
    while (plan := after_out_of_memory(plans[-1])) is not None:
        plans.append(plan)
    assert [plan.recompute_pointwise for plan in plans] == [False, True, True]
    assert [plan.offload_optimizer for plan in plans] == [0.85, 0.85, 1.0]
    assert "on it" in plans[-1].decisions[-1].reason
    assert plans[-1].streams_optimizer


def test_a_part_is_offloaded_by_deepspeed_for_adamw_only(config_of: MakeConfig) -> None:
    """Where the stage is open too: 14B needs ZeRO-3 here, and Adam's part can only be streamed."""
    pins: dict[str, Any] = {"plan": {"offload_optimizer": 0.5}}
    assert plan_of(config_of(**pins), "4xA100-80GB", model="Qwen2.5-14B").zero_stage == 3
    with pytest.raises(UserError) as caught:
        plan_of(config_of(**pins, train={"optimizer": "adam"}), "4xA100-80GB", model="Qwen2.5-14B")
    assert caught.value.field == "plan.offload_optimizer"
    streamed = plan_of(config_of(**pins, train={"optimizer": "adam"}), "4xA100-80GB", model="Qwen2.5-7B")
    assert streamed.streams_optimizer


def test_who_steps_is_shown_as_it_was_asked(config_of: MakeConfig) -> None:
    plan = plan_of(config_of(plan={"offload_optimizer_step": "device"}), model="Qwen2.5-0.5B")
    assert plan.offload_optimizer == 0
    shown = next(one for one in plan.decisions if one.field == "plan.offload_optimizer_step")
    assert (shown.value, shown.pinned) == ("device", True)
    assert "no effect" in shown.reason
