"""MLPs in tiles, where rows are long, and 8-bit linear maps, where they are asked for: chosen, counted, refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foretune.artifacts import Decision, Plan
from foretune.config import Config
from foretune.errors import UserError
from foretune.planning import make_plan, parse_hardware
from foretune.planning.layout import work_and_strategy
from foretune.planning.planner import shape_for
from foretune.planning.predict import activations, memory, timing

MakeConfig = Callable[..., Config]
ONE_H100 = "1xH100-80GB,ram=125GB,cores=16"


def plan_of(config: Config, hardware: str = ONE_H100, *, model: str = "Qwen2.5-1.5B") -> Plan:
    return make_plan(config, model_folder=model, cluster=parse_hardware(hardware), prepared=None)


def long_rows(config_of: MakeConfig, length: int, **pins: Any) -> Config:
    return config_of(train={"max_length": length, "global_batch_size": 1}, plan=pins)


def decision(plan: Plan, field: str) -> Decision:
    return next(one for one in plan.decisions if one.field == field)


def test_long_rows_keep_layers_instead_of_inner_values(config_of: MakeConfig) -> None:
    tiled = plan_of(long_rows(config_of, 131072, keep_attention=False))
    whole = plan_of(long_rows(config_of, 131072, keep_attention=False, mlp_tile_rows=0))
    assert tiled.mlp_tile_rows == 4096
    assert tiled.checkpointed_layers < whole.checkpointed_layers
    assert tiled.predicted.step_seconds < 0.98 * whole.predicted.step_seconds
    assert "computed again" in decision(tiled, "plan.mlp_tile_rows").reason
    assert decision(whole, "plan.mlp_tile_rows").pinned


@pytest.mark.parametrize("length", [65536, 131072])
def test_long_rows_keep_attention_instead_of_tiles(config_of: MakeConfig, length: int) -> None:
    kept = plan_of(long_rows(config_of, length))
    tiled = plan_of(long_rows(config_of, length, keep_attention=False))
    assert (kept.keep_attention, kept.mlp_tile_rows) == (True, 0)
    assert kept.predicted.step_seconds < 0.98 * tiled.predicted.step_seconds


def test_rows_that_only_fit_in_tiles(config_of: MakeConfig) -> None:
    assert plan_of(long_rows(config_of, 131072), "8xH100", model="Qwen2.5-7B").mlp_tile_rows == 4096
    with pytest.raises(UserError, match="without it a plan fits") as error:
        plan_of(long_rows(config_of, 131072, mlp_tile_rows=0), "8xH100", model="Qwen2.5-7B")
    assert error.value.field == "plan.mlp_tile_rows"


def test_off_where_nothing_is_gained(config_of: MakeConfig) -> None:
    for length, hardware in ((1024, ONE_H100), (16384, ONE_H100), (32768, "1xB200,ram=512GB")):
        assert plan_of(long_rows(config_of, length), hardware).mlp_tile_rows == 0


def test_tiles_in_memory_and_time(config_of: MakeConfig) -> None:
    config = long_rows(config_of, 65536, mlp_tile_rows=4096, checkpointed_layers=28)
    plan = plan_of(config)
    work, strategy = work_and_strategy(config, plan, shape_for("Qwen2.5-1.5B"))
    assert strategy.mlp_tile_rows == 4096
    whole = replace(strategy, mlp_tile_rows=0)
    h, i, tokens = 1536, 8960, 65536
    saved = memory.phases(work, whole, plan.cluster)["recomputation"]["activations"]
    tiled = memory.phases(work, strategy, plan.cluster)["recomputation"]["activations"]
    # One layer's inner values (compiled: three of them) and their gradients, for a tile of each and sums of gradients.
    tile = 4096 * 2 * (4 + 3) * i + (4 + 2 + 2) * 3 * h * i
    assert saved - tiled == tokens * 2 * ((3 + 3) * i - h) - tile
    assert activations.tile_bytes(work, strategy) == tile
    assert plan.predicted.gpu_memory_bytes == memory.device_memory(work, strategy, plan.cluster).peak
    more = timing.step_time(work, strategy, plan.cluster).compute - timing.step_time(work, whole, plan.cluster).compute
    assert more == pytest.approx(28 * 2 * 3 * h * i * tokens / (0.73 * 989e12), rel=0.05)


@pytest.mark.parametrize(
    ("values", "model", "said"),
    [
        ({"plan": {"zero_stage": 3, "mlp_tile_rows": 4096}}, "Qwen2.5-1.5B", "ZeRO-3"),
        ({"plan": {"mlp_tile_rows": 4096}}, "opt-1.3b", "opt"),
        ({"plan": {"mlp_tile_rows": 4096}, "train": {"dropout": 0.1}}, "gpt2", "dropout"),
    ],
)
def test_tiles_that_cannot_be(config_of: MakeConfig, values: dict[str, Any], model: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        plan_of(config_of(**values), model=model)
    assert error.value.field == "plan.mlp_tile_rows"


def test_the_plan_survives_its_file(config_of: MakeConfig, tmp_path: Path) -> None:
    plan = plan_of(long_rows(config_of, 65536, mlp_tile_rows=4096))
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json").mlp_tile_rows == 4096


# ── 8-bit linear maps ────────────────────────────────────────────────────────────────────────────────────────────


def test_fp8_is_never_chosen_and_promises_more_to_wider_layers(config_of: MakeConfig) -> None:
    plain = plan_of(config_of(allow_numerics=True, plan={"sum_in_matmul": False}))  # 8-bit maps do not sum inside
    assert not plain.fp8
    asked = plan_of(config_of(allow_numerics=True, plan={"fp8": True}))
    assert asked.fp8
    assert "1.23 times" in decision(asked, "plan.fp8").reason
    assert "changes numerics" in decision(asked, "plan.fp8").reason
    gains = []
    for model in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B"):
        pins = {"micro_batch_size_per_gpu": 1, "checkpointed_layers": 0, "sum_in_matmul": False, "zero_stage": 1}
        exact, fp8 = (plan_of(config_of(allow_numerics=True, plan={**pins, "fp8": one}, train={"max_length": 4096}),
                              model=model) for one in (False, True))  # fmt: skip
        gains.append(exact.predicted.step_seconds / fp8.predicted.step_seconds)
    assert gains == sorted(gains)
    assert gains[-1] > 1.1


@pytest.mark.parametrize(
    ("values", "hardware", "said"),
    [
        ({}, ONE_H100, "--allow-numerics"),
        ({"allow_numerics": True}, "1xA100-80GB", "no|not known to have 8-bit"),
        ({"allow_numerics": True}, "2xcpu,ram=64GB", "are in GPUs"),
        ({"allow_numerics": True, "train": {"precision": "fp16"}}, ONE_H100, "fp16"),
    ],
)
def test_fp8_that_cannot_be(config_of: MakeConfig, values: dict[str, Any], hardware: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        plan_of(config_of(**values, plan={"fp8": True}), hardware)
    assert error.value.field == "plan.fp8"


def test_fp8_at_zero_3_is_refused(config_of: MakeConfig) -> None:
    with pytest.raises(UserError, match="whole weights"):
        plan_of(config_of(allow_numerics=True, plan={"fp8": True, "zero_stage": 3}))
