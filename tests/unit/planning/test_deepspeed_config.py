"""Every generated configuration is taken by DeepSpeed's own configuration class, as it is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from foretune.config import Config, parse_config
from foretune.planning import make_plan, parse_hardware
from foretune.planning.deepspeed_config import deepspeed_config
from foretune.planning.shapes import known_shape
from foretune.planning.strategy import Strategy, Workload


def work_of(precision: str = "bf16", accumulation: str = "fp32", name: str = "Qwen2.5-1.5B") -> Workload:
    shape = known_shape(name)
    assert shape is not None
    return Workload(
        shape=shape, trainable=shape.parameters, frozen=0, lora_rank=0, precision=precision,  # type: ignore[arg-type]
        accumulation_dtype=accumulation, optimizer_state_bytes=8, max_length=1024, row_length=1024.0,  # type: ignore[arg-type]
        rows=16, document_length=512.0, packing=True,
    )  # fmt: skip


def config_of(**values: Any) -> Config:
    return parse_config({"model": "m", "data": "d", **values})


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Any:
    """DeepSpeed's own class, told that there are so many ranks."""
    from deepspeed.runtime import config as ds

    def read(values: dict[str, Any], ranks: int) -> Any:
        monkeypatch.setattr(ds.dist, "get_rank", lambda *_: 0)
        monkeypatch.setattr(ds.dist, "get_world_size", lambda *_: ranks)
        return ds.DeepSpeedConfig(values)

    return read


LAYOUTS = [
    *itertools.product((0, 1, 2, 3), (0.0,), (False,)),
    (1, 1.0, False), (2, 1.0, False), (3, 0.7, False), (3, 1.0, False), (3, 1.0, True),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("standalone", [False, True], ids=["ours", "standalone"])
def test_deepspeed_takes_it(
    read: Any, layout: tuple[int, float, bool], precision: str, standalone: bool, tmp_path: Path
) -> None:
    stage, share, offload_param = layout
    accumulation = precision if stage == 0 else "fp32"
    strategy = Strategy(stage, 2, 3, 4, share, offload_param)  # type: ignore[arg-type]
    config = config_of(train={"max_grad_norm": 0.5, "weight_decay": 0.1})
    made = deepspeed_config(
        work_of(precision, accumulation), strategy, parse_hardware("4xH100"), train=config.train,
        standalone=standalone, learning_rate=1e-5, warmup_steps=3, total_steps=100,
    )  # fmt: skip
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(made))
    taken = read(json.loads(file.read_text()), 4)
    assert taken.zero_optimization_stage == stage
    assert taken.train_batch_size == 24
    assert taken.gradient_clipping == 0.5
    assert taken.bfloat16_config.enabled == (precision == "bf16")
    assert taken.float16_config.enabled == (precision == "fp16")
    assert taken.grad_accum_dtype == accumulation
    assert taken.zero_config.overlap_comm is False
    assert (taken.optimizer_name is not None) == standalone
    assert (taken.scheduler_name is not None) == standalone
    assert taken.managed_gradient_accumulation == standalone
    if share:
        assert taken.zero_config.offload_optimizer.device == "cpu"
        assert taken.zero_config.offload_optimizer.ratio == (share if stage == 3 else 1.0)
    else:
        assert taken.zero_config.offload_optimizer is None
    assert (taken.zero_config.offload_param is not None) == offload_param


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_standalone_sections_build_what_they_name(read: Any, optimizer: str, schedule: str) -> None:
    """The scheduler's parameters are those of DeepSpeed's class: it is built here, on a real optimizer."""
    import torch
    from deepspeed.runtime import lr_schedules

    train = config_of(train={"optimizer": optimizer, "schedule": schedule}).train
    made = deepspeed_config(
        work_of(), Strategy(1, 1, 1), parse_hardware("1xH100"), train=train, standalone=True, learning_rate=1e-3,
        warmup_steps=10, total_steps=100,
    )  # fmt: skip
    taken = read(made, 1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    built = torch.optim.SGD([parameter], lr=taken.optimizer_params["lr"])
    scheduler = getattr(lr_schedules, taken.scheduler_name)(built, **taken.scheduler_params)
    rates = []
    for step in range(100):
        scheduler.step(step)
        rates.append(built.param_groups[0]["lr"])
    assert max(rates) == pytest.approx(1e-3, rel=1e-2)
    assert rates[0] < 3e-4
    assert rates[99] < 1e-4 or schedule == "constant"
    if optimizer == "adam":
        assert taken.optimizer_params["adam_w_mode"] is False


def test_buffers_are_sized_to_the_model() -> None:
    train = config_of().train
    small, large = (
        deepspeed_config(work, Strategy(3, 1, 1).sized_for(work), parse_hardware("2xH100"), train=train)
        for work in (work_of(name="gpt2"), work_of(name="Llama-3.1-70B"))
    )
    for key in ("reduce_bucket_size", "stage3_max_live_parameters", "stage3_param_persistence_threshold"):
        assert small["zero_optimization"][key] < large["zero_optimization"][key]
    assert large["zero_optimization"]["reduce_bucket_size"] < 500_000_000
    assert large["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is False


def test_pinned_memory_is_for_gpus() -> None:
    for hardware, pinned in (("1xH100", True), ("1xcpu", False)):
        made = deepspeed_config(
            work_of("fp32"), Strategy(2, 1, 1, offload_optimizer=1.0), parse_hardware(hardware), train=config_of().train
        )
        assert made["zero_optimization"]["offload_optimizer"]["pin_memory"] is pinned


@pytest.mark.parametrize(
    "hardware", ["2xcpu,ram=64GB", "1xT4", "1xH100,ram=125GB,cores=16", "8xH100", "16x8xA100-80GB"]
)
@pytest.mark.parametrize("model", ["gpt2", "Qwen2.5-7B"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_deepspeed_takes_what_plans_say(read: Any, hardware: str, model: str, method: str) -> None:
    from foretune.errors import NoPlanFits

    try:
        plan = make_plan(config_of(method=method), model_folder=model, cluster=parse_hardware(hardware), prepared=None)
    except NoPlanFits:
        assert model == "Qwen2.5-7B"
        return
    taken = read(plan.deepspeed_config, plan.world_size)
    assert taken.train_micro_batch_size_per_gpu == plan.micro_batch_size_per_gpu
    assert taken.gradient_accumulation_steps == plan.gradient_accumulation_steps
    assert taken.zero_optimization_stage == plan.zero_stage
