"""What the planner decides, what it refuses, and the laws it keeps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foretune.artifacts import Decision, Plan, PreparedDataset
from foretune.config import Config
from foretune.config.schema import PlanConfig
from foretune.errors import NoPlanFits, UserError
from foretune.planning import make_plan, parse_hardware, probe
from foretune.planning.layout import work_and_strategy
from foretune.planning.machines.catalogue import GIB
from foretune.planning.mathematics import SAVING_BYTES_PER_SECOND, SAVING_SHARE
from foretune.planning.planner import shape_for
from foretune.planning.predict import host, memory

STORIES = Path(__file__).parents[2] / "models" / "stories260K"
MakeConfig = Callable[..., Config]
MakePrepared = Callable[..., PreparedDataset]
ONE_H100 = "1xH100-80GB,ram=125GB,cores=16"


def plan_of(config: Config, hardware: str, *, model: str = "Qwen2.5-7B", **facts: Any) -> Plan:
    return make_plan(config, model_folder=model, cluster=parse_hardware(hardware), **{"prepared": None, **facts})


def decision(plan: Plan, field: str) -> Decision:
    return next(decision for decision in plan.decisions if decision.field == field)


# ── what it decides ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_tiny_model_on_two_cpu_ranks(config_of: MakeConfig, prepared_of: MakePrepared) -> None:
    plan = make_plan(config_of(), model_folder=STORIES, cluster=probe(2), prepared=prepared_of(max_length=512))
    assert plan.parameters == 260_032
    assert (plan.world_size, plan.precision, plan.offload_optimizer) == (2, "fp32", 0.0)
    assert plan.checkpointed_layers == 0
    places = plan.world_size * plan.micro_batch_size_per_gpu * plan.gradient_accumulation_steps
    assert places >= plan.global_batch_size
    assert plan.deepspeed_config["train_batch_size"] == places


def test_a_cpu_gets_small_micro_batches(config_of: MakeConfig, prepared_of: MakePrepared) -> None:
    config = config_of(train={"global_batch_size": 64})
    plan = plan_of(config, "2xcpu,ram=64GB", model="SmolLM2-135M", prepared=prepared_of())
    assert plan.micro_batch_size_per_gpu <= 4
    assert plan.micro_batch_size_per_gpu * plan.gradient_accumulation_steps * 2 == 64


def test_full_7b_on_one_80_gb_card(config_of: MakeConfig) -> None:
    """The usual ZeRO-2 with offload dies of the host's memory after minutes; a part of the optimizer offloaded runs."""
    config = config_of(train={"max_length": 4096}, plan={"offload_optimizer_step": "host"})
    plan = plan_of(config, ONE_H100)
    assert plan.zero_stage == 3
    assert 0.3 <= plan.offload_optimizer <= 0.8
    assert not plan.streams_optimizer
    assert plan.predicted.gpu_memory_bytes < 0.92 * 79.1 * GIB
    assert plan.predicted.host_memory_bytes_per_node < 125 * GIB
    assert plan.predicted.tokens_per_second > 4000
    usual = next(lost for lost in plan.rejected if lost.name == "ZeRO-2 + optimizer in host memory")
    assert "of host memory a node" in usual.reason
    assert "125.0 GiB" in usual.reason


def test_7b_on_24_gb_wants_lora(config_of: MakeConfig) -> None:
    with pytest.raises(NoPlanFits) as error:
        plan_of(config_of(train={"max_length": 4096}), "1xRTX4090,ram=64GB")
    assert "method=lora" in error.value.mend
    assert any("ZeRO-2" in line and "GiB" in line for line in error.value.needed)
    plan = plan_of(config_of(train={"max_length": 4096}, method="lora"), "1xRTX4090,ram=64GB")
    assert plan.trainable_parameters == 40_370_176
    assert plan.predicted.gpu_memory_bytes < 0.92 * 23.6 * GIB
    assert plan.offload_optimizer == 0


def test_every_change_that_is_proposed_fits(config_of: MakeConfig) -> None:
    """Each is planned here as it is written, on the machine that it names."""
    with pytest.raises(NoPlanFits) as error:
        plan_of(config_of(train={"max_length": 4096}), "1xRTX4090,ram=64GB")
    changes = error.value.mend.split("; or ")
    assert len(changes) >= 4
    for change in changes:
        machine = re.search(r"\(([^)]+)\)", change)
        memory_text = re.match(r"([0-9.]+) GiB of host memory", change)
        if change.startswith("--set method=lora"):
            plan_of(config_of(train={"max_length": 4096}, method="lora"), "1xRTX4090,ram=64GB")
        elif memory_text is not None:
            plan_of(config_of(train={"max_length": 4096}), f"1xRTX4090,ram={memory_text[1]}GB")
        else:
            assert machine is not None, change
            spec = machine[1] if "ram=" in machine[1] else f"{machine[1]},ram=64GB"
            plan_of(config_of(train={"max_length": 4096}), spec)


def test_quantised_weights_are_refused_with_the_reason(config_of: MakeConfig, tmp_path: Path) -> None:
    keys = json.loads((STORIES / "config.json").read_text())
    keys["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    for values, said in (({"plan": {"zero_stage": 3}, "method": "lora"}, "ZeRO-3"), ({}, "quantised")):
        with pytest.raises(UserError, match=said) as error:
            make_plan(config_of(**values), model_folder=tmp_path, cluster=parse_hardware("1xH100"), prepared=None)
        assert error.value.field == "model"


def test_bf16_states_are_proposed_only_when_allowed_and_said(config_of: MakeConfig) -> None:
    config = config_of(train={"max_length": 4096})
    asked = config_of(train={"max_length": 4096}, plan={"optimizer_dtype": "bf16"}, allow_numerics=True)
    plan = plan_of(asked, "1xH200,ram=64GB")
    assert plan.optimizer_dtype == "bf16"
    assert "changes numerics" in decision(plan, "plan.optimizer_dtype").reason
    assert plan.gradient_accumulation_dtype == "bf16"
    assert plan.deepspeed_config["bf16"]["bf16_optimizer_states"] is True
    proposed = config_of(train={"max_length": 4096, "optimizer": "sgd"}, allow_numerics=True)  # not Adam: no 8 bits
    assert plan_of(proposed, "1xH100,ram=64GB").optimizer_dtype == "bf16"
    with pytest.raises(NoPlanFits, match="--allow-numerics"):
        plan_of(config, "1xH200,ram=64GB")
    with pytest.raises(UserError, match="--allow-numerics"):
        plan_of(config_of(plan={"optimizer_dtype": "bf16"}), "8xH100")


def test_nvme_only_where_a_path_is_given(config_of: MakeConfig) -> None:
    config = config_of(plan={"nvme_path": "/fast"}, train={"max_length": 4096})
    plan = plan_of(config, "1xH100,ram=64GB")
    zero = plan.deepspeed_config["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "pin_memory": True, "ratio": 1.0, "nvme_path": "/fast"}
    assert plan.predicted.host_memory_bytes_per_node <= host.host_budget(plan.cluster)
    assert "/fast" in decision(plan, "plan.offload_optimizer").reason


def test_energy_and_cost_when_there_is_a_price(config_of: MakeConfig) -> None:
    predicted = plan_of(config_of(), "8xH100,price=2.5", tokens=50_000_000).predicted
    hours = 8 * predicted.total_seconds / 3600
    assert predicted.cost == pytest.approx(2.5 * hours)
    assert predicted.energy_kwh == pytest.approx(0.7 * hours)
    assert plan_of(config_of(), "8xH100").predicted.cost is None


def test_snapshots_count_in_host_memory_where_they_fit(config_of: MakeConfig) -> None:
    roomy = plan_of(config_of(), "8xH100,ram=2TB")
    parts = roomy.predicted.host_memory_parts
    assert parts["snapshot of a checkpoint"] == roomy.predicted.checkpoint_bytes
    assert sum(parts.values()) == roomy.predicted.host_memory_bytes_per_node
    tight = plan_of(config_of(train={"max_length": 4096}), ONE_H100)
    assert "snapshot of a checkpoint" not in tight.predicted.host_memory_parts
    assert decision(tight, "checkpoint").value == "training waits"


def test_7b_on_eight_cards_needs_no_offload(config_of: MakeConfig) -> None:
    plan = plan_of(config_of(train={"max_length": 4096}), "8xH100")
    assert plan.zero_stage in (2, 3)
    assert plan.offload_optimizer == 0
    assert not plan.offload_param


def test_70b_needs_several_machines(config_of: MakeConfig) -> None:
    config = config_of(train={"max_length": 4096})
    with pytest.raises(NoPlanFits):
        plan_of(config, "8xH100", model="Llama-3.1-70B")
    assert plan_of(config, "8x8xH100", model="Llama-3.1-70B").zero_stage == 3


def test_some_layers_are_checkpointed_rather_than_all_or_none(config_of: MakeConfig) -> None:
    config = config_of(train={"max_length": 8192, "global_batch_size": 1}, plan={"compile": False})
    plan = plan_of(config, "1xA100-40GB,ram=256GB", model="Qwen2.5-1.5B")
    assert 0 < plan.checkpointed_layers < 28
    assert "the fewest that fit" in decision(plan, "plan.checkpointed_layers").reason


def test_every_choice_has_a_reason(config_of: MakeConfig) -> None:
    plan = plan_of(config_of(), "8xH100")
    fields = {one.field for one in plan.decisions}
    assert fields >= {"train.precision", "train.learning_rate", "train.global_batch_size", "train.max_length"}
    assert fields >= {f"plan.{name}" for name in PlanConfig.model_fields if name != "nvme_path"}
    assert "checkpoint.every" in fields
    assert all(one.reason for one in plan.decisions)
    assert not any(one.pinned for one in plan.decisions)
    assert all(lost.reason for lost in plan.rejected)


def test_what_was_assumed_is_said(config_of: MakeConfig) -> None:
    plan = plan_of(config_of(), "2x8xH100")
    assert "assumed" in decision(plan, "hardware").reason
    assert "assumed" in decision(plan, "data").reason
    assert "as given" in decision(plan_of(config_of(), "8xH100", tokens=123_456), "data").reason


def test_an_estimated_shape_is_said(config_of: MakeConfig, tmp_path: Path) -> None:
    keys = json.loads((STORIES / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**keys, "model_type": "brand_new"}))
    plan = make_plan(config_of(), model_folder=tmp_path, cluster=parse_hardware("2xcpu"), prepared=None)
    assert "estimated" in decision(plan, "model").reason


@pytest.mark.parametrize(
    ("method", "stage", "precision", "measured_gib"),
    [
        ("full", 1, "bf16", 35.94),
        ("full", 3, "bf16", 36.12),
        ("lora", 1, "bf16", 26.90),
        ("lora", 3, "bf16", 26.91),
        ("full", 2, "fp16", 34.10),
    ],
)
def test_memory_that_real_runs_on_an_h100_took(
    config_of: MakeConfig, method: str, stage: int, precision: str, measured_gib: float
) -> None:
    """The 0.5B shape, 16 rows of 1024, torch 2.11: what its allocator had at most.

    Measured while the loss still kept a chunk's logits and gradient in one more format (2 bytes a logit more), and its
    head's gradient to itself.
    """
    pins = {"zero_stage": stage, "micro_batch_size_per_gpu": 16, "loss_chunk_tokens": 2048}
    config = config_of(
        method=method,
        plan={**pins, "attention": "sdpa", "compile": False, "sum_in_matmul": False},
        train={"max_length": 1024, "global_batch_size": 16, "precision": precision},
    )
    parts = plan_of(config, ONE_H100, model="Qwen2.5-0.5B").predicted.gpu_memory_parts
    predicted = (sum(parts.values()) - parts["context"] + 2 * 2048 * 151936) / GIB
    assert predicted == pytest.approx(measured_gib, rel=0.005)


@pytest.mark.parametrize(("length", "measured_gib"), [(384, 3.29)])
def test_memory_that_real_runs_on_cpus_took(config_of: MakeConfig, length: int, measured_gib: float) -> None:
    """SmolLM2-135M, two ranks, ZeRO-2, fp32: the largest resident set of a rank after many steps."""
    config = config_of(plan={"zero_stage": 2}, train={"max_length": length, "global_batch_size": 2})
    plan = plan_of(config, "2xcpu,ram=24GB", model="SmolLM2-135M")
    assert plan.predicted.gpu_memory_bytes / GIB == pytest.approx(measured_gib, rel=0.05)


# ── the mathematics it decides does not depend on the machines ───────────────────────────────────────────────────


@pytest.mark.parametrize("hardware", ["1xcpu", "4xcpu", "1xH100", "8xH100", "4x8xA100-80GB", "3xL4"])
def test_the_update_is_the_same_everywhere(config_of: MakeConfig, prepared_of: MakePrepared, hardware: str) -> None:
    here = plan_of(config_of(), "1xA100-80GB", model="gpt2", prepared=prepared_of())
    there = plan_of(config_of(), hardware, model="gpt2", prepared=prepared_of())
    for field in ("global_batch_size", "learning_rate", "total_steps", "steps_per_epoch", "warmup_steps", "max_length"):
        assert getattr(here, field) == getattr(there, field)


@pytest.mark.parametrize(
    ("packs", "documents", "expected"),
    [
        (1450, 7400, 8),  # about 100 updates and more an epoch
        (10, 50, 2),  # at least 8 documents
        (3, 3, 2),  # never more rows than there are, nor past a power of two
        (1, 500, 1),
        (1_000_000, 5_000_000, 64),
        (6400, 6400, 64),
        (900, 900, 8),
    ],
)
def test_global_batch(
    config_of: MakeConfig, prepared_of: MakePrepared, packs: int, documents: int, expected: int
) -> None:
    prepared = prepared_of(packs=packs, documents=documents, tokens=packs * 1000)
    assert plan_of(config_of(), "1xH100", model="gpt2", prepared=prepared).global_batch_size == expected


def test_steps_are_whole_batches_of_each_epoch(config_of: MakeConfig, prepared_of: MakePrepared) -> None:
    config = config_of(train={"epochs": 3.0, "global_batch_size": 100, "warmup_ratio": 0.1})
    plan = plan_of(config, "1xH100", model="gpt2", prepared=prepared_of())
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (15, 45, 5)
    assert plan_of(config_of(train={"max_steps": 7}), "1xH100", model="gpt2", prepared=prepared_of()).total_steps == 7


@pytest.mark.parametrize(
    ("model", "values", "expected"),
    [
        ("pythia-70m", {}, 1e-4),
        ("SmolLM2-135M", {}, 1e-4),
        ("Qwen2.5-0.5B", {}, 2e-5),
        ("Qwen2.5-7B", {}, 1e-5),
        ("Qwen2.5-7B", {"method": "lora"}, 2e-4),
        ("Qwen2.5-72B", {"method": "lora"}, 1e-4),
        ("gpt2", {"train": {"optimizer": "sgd"}}, 5e-2),
        ("gpt2", {"from_scratch": True}, 6e-4),
        ("gpt2", {"train": {"learning_rate": 3e-3}}, 3e-3),
    ],
)
def test_learning_rates(config_of: MakeConfig, model: str, values: dict[str, Any], expected: float) -> None:
    plan = plan_of(config_of(**values), "64x8xH100", model=model)
    assert plan.learning_rate == expected
    assert decision(plan, "train.learning_rate").pinned == ("learning_rate" in values.get("train", {}))


def test_checkpoints_bound_the_lost_work(config_of: MakeConfig, prepared_of: MakePrepared) -> None:
    slow = plan_of(config_of(train={"max_length": 2048}), "1xcpu,ram=512GB", model="Qwen2.5-0.5B")
    assert slow.checkpoint_every == max(1, int(900 / slow.predicted.step_seconds))
    tiny = plan_of(config_of(), "2xcpu", model=str(STORIES), prepared=prepared_of(max_length=512))
    assert tiny.checkpoint_every == -(-tiny.total_steps // 10)


def test_checkpoints_are_never_most_of_the_work(config_of: MakeConfig) -> None:
    plan = plan_of(config_of(), "1xH100", model="Qwen2.5-0.5B", tokens=100_000_000)
    saving = plan.predicted.checkpoint_bytes / SAVING_BYTES_PER_SECOND
    assert saving <= SAVING_SHARE * plan.checkpoint_every * plan.predicted.step_seconds
    assert plan_of(config_of(checkpoint={"every": 5}), "1xH100", model="gpt2").checkpoint_every == 5


def test_empty_places_are_counted(config_of: MakeConfig) -> None:
    plan = plan_of(config_of(train={"global_batch_size": 5}), "3xH100", model="gpt2")
    assert 3 * plan.micro_batch_size_per_gpu * plan.gradient_accumulation_steps == 6
    assert "1 places stay empty" in decision(plan, "plan.micro_batch_size_per_gpu").reason


def test_documents_that_are_not_packed_make_more_rows(config_of: MakeConfig, prepared_of: MakePrepared) -> None:
    packed = plan_of(config_of(), "1xH100", model="gpt2", prepared=prepared_of())
    config = config_of(data={"path": "d.jsonl", "packing": False})
    unpacked = plan_of(config, "1xH100", model="gpt2", prepared=prepared_of())
    assert unpacked.global_batch_size == packed.global_batch_size
    rows = unpacked.micro_batch_size_per_gpu * unpacked.gradient_accumulation_steps
    assert rows >= packed.global_batch_size * 7400 / 1450


# ── precision ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("hardware", "expected"), [("2xcpu", "fp32"), ("1xA100-80GB", "bf16"), ("1xV100-32GB", "fp16"), ("1xT4", "fp16")]
)
def test_precision(config_of: MakeConfig, hardware: str, expected: str) -> None:
    plan = plan_of(config_of(), hardware, model="gpt2")
    assert plan.precision == expected
    assert plan.gradient_accumulation_dtype == "fp32"


@pytest.mark.parametrize(("hardware", "precision"), [("2xcpu", "fp16"), ("1xV100-32GB", "bf16"), ("1xT4", "bf16")])
def test_precision_the_hardware_lacks_is_refused(config_of: MakeConfig, hardware: str, precision: str) -> None:
    with pytest.raises(UserError) as error:
        plan_of(config_of(train={"precision": precision}), hardware, model="gpt2")
    assert error.value.field == "train.precision"


def test_bf16_on_a_plain_cpu_is_allowed_and_said_to_be_slow(config_of: MakeConfig) -> None:
    plan = plan_of(config_of(train={"precision": "bf16"}), "2xcpu", model="gpt2")
    assert "20 times" in decision(plan, "train.precision").reason


def test_zero_0_adds_up_in_the_models_format_only(config_of: MakeConfig) -> None:
    """DeepSpeed has no ZeRO-0 with 16-bit weights and fp32 sums, so it is no choice unless it is pinned."""
    assert plan_of(config_of(), "8xH100", model="gpt2").zero_stage > 0
    pinned = plan_of(config_of(plan={"zero_stage": 0}), "8xH100", model="gpt2")
    assert pinned.gradient_accumulation_dtype == "bf16"
    with pytest.raises(UserError) as error:
        plan_of(config_of(plan={"zero_stage": 0, "gradient_accumulation_dtype": "fp32"}), "8xH100", model="gpt2")
    assert error.value.field == "plan.gradient_accumulation_dtype"


# ── pins ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "pins",
    [
        {"zero_stage": 3},
        {"zero_stage": 1, "micro_batch_size_per_gpu": 2},
        {"checkpointed_layers": 7},
        {"offload_optimizer": True, "zero_stage": 2},
        {"offload_optimizer": 0.4},
        {"zero_stage": 3, "offload_optimizer": True, "offload_param": True},
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_dtype": "bf16"},
    ],
)
def test_pins_are_kept(config_of: MakeConfig, pins: dict[str, Any]) -> None:
    plan = plan_of(config_of(plan=pins, train={"global_batch_size": 16}), "2xH100,ram=1TB", model="Qwen2.5-1.5B")
    for name, value in pins.items():
        assert getattr(plan, name) == value
        assert decision(plan, f"plan.{name}").pinned


@pytest.mark.parametrize(
    ("hardware", "values", "field", "said"),
    [
        (ONE_H100, {"plan": {"zero_stage": 2}}, "plan.zero_stage", "GiB"),
        (ONE_H100, {"plan": {"offload_optimizer": False}}, "plan.offload_optimizer", "GiB"),
        ("8xH100", {"plan": {"checkpointed_layers": 0, "micro_batch_size_per_gpu": 64}}, "plan.", "GiB"),
        ("8xH100", {"plan": {"checkpointed_layers": 99}}, "plan.checkpointed_layers", "28 layers"),
        ("8xH100", {"plan": {"offload_param": True, "zero_stage": 2}}, "plan.offload_param", "ZeRO-2"),
        ("8xH100", {"plan": {"offload_optimizer": True, "zero_stage": 0}}, "plan.offload_optimizer", "ZeRO-0"),
        ("8xH100", {"plan": {"offload_optimizer": 0.5, "zero_stage": 2}}, "plan.offload_optimizer", "only ZeRO-3"),
        ("8xH100", {"plan": {"offload_optimizer": 0.5}, "train": {"optimizer": "sgd"}}, "plan.offload_", "AdamW"),
        ("8xcpu,ram=1TB", {"plan": {"offload_optimizer": 0.5}}, "plan.offload_optimizer", "CPU"),
        ("8xH100", {"plan": {"gradient_accumulation_dtype": "fp16"}}, "plan.gradient_accumulation_dtype", "bf16"),
        ("1xH100", {"plan": {"gradient_accumulation_steps": 2, "micro_batch_size_per_gpu": 1},
                    "train": {"global_batch_size": 8}}, "plan.gradient_accumulation_steps", "fewer than"),
        ("8xH100", {"method": "lora", "lora": {"target_modules": ["nope"]}}, "lora.target_modules", "nope"),
    ],
)  # fmt: skip
def test_pins_that_cannot_be_are_refused_with_figures(
    config_of: MakeConfig, hardware: str, values: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(UserError) as error:
        plan_of(config_of(**values), hardware)
    assert error.value.field.startswith(field)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("values", "prepared", "field"),
    [
        ({"train": {"max_length": 2048}}, False, "train.max_length"),
        ({"train": {"max_length": 512}}, True, "train.max_length"),
    ],
)
def test_lengths_that_cannot_be_are_refused(
    config_of: MakeConfig, prepared_of: MakePrepared, values: dict[str, Any], prepared: bool, field: str
) -> None:
    with pytest.raises(UserError) as error:
        plan_of(config_of(**values), "1xH100", model="gpt2", prepared=prepared_of() if prepared else None)
    assert error.value.field == field


def test_a_name_that_nobody_knows(config_of: MakeConfig) -> None:
    with pytest.raises(UserError, match="no such folder") as error:
        plan_of(config_of(), "1xH100", model="Qwen2.5-8B")
    assert error.value.field == "model"
    assert "qwen2.5-7b" in error.value.mend


def test_smaller_chunks_of_the_loss_are_tried_where_layers_are_pinned(config_of: MakeConfig) -> None:
    """262 thousand words, and no layer may recompute: it is the logits that must give way."""
    pins = {"checkpointed_layers": 0, "micro_batch_size_per_gpu": 8, "zero_stage": 1}
    config = config_of(plan=pins, train={"max_length": 1024})
    roomy, tight = (plan_of(config, f"1x{card}", model="gemma-3-1b") for card in ("A100-40GB", "RTX4090"))
    assert roomy.checkpointed_layers == tight.checkpointed_layers == 0
    assert tight.loss_chunk_tokens < roomy.loss_chunk_tokens


# ── laws ─────────────────────────────────────────────────────────────────────────────────────────────────────────

MODELS = st.sampled_from(["gpt2", "SmolLM2-135M", "Qwen3-1.7B", "Llama-3.1-8B", "gemma-2-9b", "Llama-3.1-70B"])
MACHINES = st.builds(
    lambda nodes, devices, card, ram: f"{nodes}x{devices}x{card},ram={ram}GB",
    nodes=st.sampled_from([1, 2, 16]),
    devices=st.sampled_from([1, 2, 8]),
    card=st.sampled_from(["H100-80GB", "A100-40GB", "RTX4090", "V100-16GB", "cpu"]),
    ram=st.sampled_from([32, 128, 1024]),
)
laws = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@laws
@given(model=MODELS, machine=MACHINES, method=st.sampled_from(["full", "lora"]))
def test_a_plan_fits_what_it_was_made_for(config_of: MakeConfig, model: str, machine: str, method: str) -> None:
    try:
        plan = plan_of(config_of(method=method), machine, model=model)
    except NoPlanFits:
        return
    assert plan.predicted.gpu_memory_bytes <= memory.budget(plan.cluster)
    assert plan.predicted.host_memory_bytes_per_node <= host.host_budget(plan.cluster)
    assert plan.predicted.gpu_memory_bytes == sum(plan.predicted.gpu_memory_parts.values())
    rows = plan.world_size * plan.micro_batch_size_per_gpu * plan.gradient_accumulation_steps
    assert plan.global_batch_size <= rows < plan.global_batch_size + plan.world_size * plan.micro_batch_size_per_gpu
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@laws
@given(model=MODELS, machine=MACHINES, factor=st.sampled_from([1.25, 2.0, 8.0]))
def test_more_memory_never_hurts(config_of: MakeConfig, model: str, machine: str, factor: float) -> None:
    config = config_of(plan={"compile": False})  # which a run that gets shorter may lose
    small = parse_hardware(machine)
    device = small.accelerator.model_copy(update={"memory_bytes": int(small.accelerator.memory_bytes * factor)})
    host = int(small.host_memory_bytes * factor)
    large = small.model_copy(update={"accelerator": device, "host_memory_bytes": host})
    try:
        before = make_plan(config, model_folder=model, cluster=small, prepared=None)
    except NoPlanFits:
        return
    after = make_plan(config, model_folder=model, cluster=large, prepared=None)
    # Equally fast plans may be exchanged for simpler ones, within the tolerance that says so.
    assert after.predicted.step_seconds <= 1.02 * before.predicted.step_seconds


# ── speed and independence ───────────────────────────────────────────────────────────────────────────────────────


def test_no_torch_and_little_time() -> None:
    """A fresh process imports the planner and plans, without torch, transformers or deepspeed."""
    code = """
import sys, time
start = time.perf_counter()
from foretune.config import parse_config
from foretune.planning import make_plan, parse_hardware, probe
imported = time.perf_counter()
probe(1)
for hardware in ("1xRTX4090,ram=64GB", "128x8xH100"):
    config = parse_config({"model": "m", "data": "d", "method": "lora"})
    make_plan(config, model_folder="Llama-3.1-8B", cluster=parse_hardware(hardware), prepared=None)
heavy = [name for name in ("torch", "transformers", "deepspeed", "datasets", "peft", "numpy") if name in sys.modules]
print(heavy, imported - start, time.perf_counter() - imported)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.startswith("[] "), answer.stdout


@pytest.mark.parametrize("hardware", ["1xH100,ram=512GB", "128x8xH100", "1xRTX4090,ram=32GB", "4xcpu"])
@pytest.mark.parametrize("model", ["gpt2", "Qwen2.5-7B", "Llama-3.1-405B"])
def test_a_plan_takes_less_than_a_second(config_of: MakeConfig, model: str, hardware: str) -> None:
    """Also where nothing fits, and what would is looked for. The least of two: other processes share these cores."""
    config = config_of(train={"global_batch_size": 1024}, allow_numerics=True)
    assert min(_seconds(config, hardware, model) for _ in range(2)) < 1.0


def _seconds(config: Config, hardware: str, model: str) -> float:
    start = time.process_time()
    with suppress(NoPlanFits):
        plan_of(config, hardware, model=model)
    return time.process_time() - start


@pytest.mark.parametrize(
    ("plan", "hardware", "name"),
    [
        ({"zero_stage": 2, "offload_optimizer": True}, "2xH100", "ZeRO-2 + optimizer in host memory"),
        (
            {"zero_stage": 3, "offload_optimizer": True, "offload_param": True, "nvme_path": "/fast"},
            "1xRTX4090,ram=64GB",
            "ZeRO-3 + optimizer in NVMe + parameters in NVMe",
        ),
        ({"zero_stage": 2, "optimizer_dtype": "bf16"}, "2xH100", "ZeRO-2 + bf16 optimizer"),
        ({"optimizer_dtype": "8bit"}, "2xH100", "ZeRO-1 + 8-bit optimizer"),
    ],
)
def test_a_plan_has_the_name_of_its_strategy(
    config_of: MakeConfig, plan: dict[str, Any], hardware: str, name: str
) -> None:
    config = config_of(plan=plan, allow_numerics=True)
    made = plan_of(config, hardware)
    assert made.strategy_name == name
    assert work_and_strategy(config, made, shape_for("Qwen2.5-7B"))[1].name == name
