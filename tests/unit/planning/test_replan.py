"""After the device's memory did not do: less at a time, the same global batch, and an end to it."""

from pathlib import Path

from foretune import planning
from foretune.artifacts import Plan
from foretune.config import parse_config

MODEL = Path(__file__).parents[2] / "models" / "stories260K"


def first_plan() -> Plan:
    config = parse_config(
        {
            "model": str(MODEL),
            "data": {"sources": [{"path": "none.jsonl"}]},
            "train": {"global_batch_size": 12, "max_length": 64},
            "plan": {"micro_batch_size_per_gpu": 6, "checkpointed_layers": 0},
        }
    )
    cluster = planning.parse_hardware("2xcpu")
    return planning.make_plan(config, model_folder=MODEL, cluster=cluster, prepared=None, tokens=100_000)


def test_compiled_layers_make_pointwise_values_again_before_they_recompute() -> None:
    config = parse_config(
        {
            "model": "Qwen2.5-1.5B",
            "data": {"sources": [{"path": "none.jsonl"}]},
            "train": {"global_batch_size": 16, "max_length": 4096},
            "plan": {"micro_batch_size_per_gpu": 1, "checkpointed_layers": 0},
        }
    )
    cluster = planning.parse_hardware("1xH100-80GB")
    plans = [planning.make_plan(config, model_folder="Qwen2.5-1.5B", cluster=cluster, prepared=None, tokens=10**8)]
    while (plan := planning.after_out_of_memory(plans[-1])) is not None:
        plans.append(plan)
    assert [plan.compile_layers for plan in plans] == [True] * 3
    assert [(plan.recompute_pointwise, plan.checkpointed_layers) for plan in plans] == [
        (False, 0),
        (True, 0),
        (True, 28),
    ]


def test_attention_is_not_kept_before_more_layers_recompute() -> None:
    plan = first_plan().model_copy(
        update={"micro_batch_size_per_gpu": 1, "compile_layers": True, "recompute_pointwise": True,
                "keep_attention": True, "checkpointed_layers": 2}
    )  # fmt: skip
    without = planning.after_out_of_memory(plan)
    assert without is not None
    assert (without.keep_attention, without.checkpointed_layers) == (False, 2)
    last = planning.after_out_of_memory(without)
    assert last is not None
    assert last.checkpointed_layers == 5
    kept_by_none = plan.model_copy(update={"checkpointed_layers": 0})
    more = planning.after_out_of_memory(kept_by_none)  # what no layer recomputes, none keeps: nothing to be had there
    assert more is not None
    assert (more.keep_attention, more.checkpointed_layers) == (True, 5)


def test_micro_batches_shrink_then_layers_recompute_then_it_ends() -> None:
    plans = [first_plan()]
    while (plan := planning.after_out_of_memory(plans[-1])) is not None:
        plans.append(plan)
    shapes = [(plan.micro_batch_size_per_gpu, plan.gradient_accumulation_steps) for plan in plans]
    assert shapes == [(6, 1), (3, 2), (1, 6), (1, 6)]
    assert [plan.checkpointed_layers for plan in plans] == [0, 0, 0, 5]
    assert {plan.global_batch_size for plan in plans} == {12}
    for plan in plans:
        config = plan.deepspeed_config
        assert config["train_micro_batch_size_per_gpu"] == plan.micro_batch_size_per_gpu
        assert config["train_batch_size"] == config["gradient_accumulation_steps"] * plan.micro_batch_size_per_gpu * 2
    assert "ran out of memory" in plans[-1].decisions[-1].reason
    assert [plan.replanned for plan in plans] == [False, True, True, True]
    assert "not predicted" in plans[-1].decisions[-1].reason
