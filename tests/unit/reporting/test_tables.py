"""The tables: every figure of an artifact is there, at every width, and nothing is wider than the screen."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from foretune.artifacts import (
    Accelerator,
    Alternative,
    Cluster,
    Decision,
    EvaluationReport,
    GenerationSample,
    LossEstimate,
    Plan,
    Prediction,
    PreparedDataset,
    RenderedSample,
    SourceSummary,
)
from foretune.reporting import tables
from foretune.reporting.plan_view import plan_view

GIB = 2**30
WIDTHS = [40, 50, 80, 120]


def drawn(renderable: RenderableType, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert max((len(line) for line in text.splitlines()), default=0) <= width
    return text


def squeezed(text: str) -> str:
    return " ".join(text.split())


def make_plan(**changes: Any) -> Plan:
    accelerator = Accelerator(
        name="A100-40GB",
        kind="cuda",
        memory_bytes=40 * GIB,
        bf16=True,
        fp16=True,
        peak_flops=3e14,
        memory_bandwidth=1e12,
    )
    cluster = Cluster(
        accelerator=accelerator, nodes=2, devices_per_node=8, host_memory_bytes=512 * GIB, cores_per_node=64,
        link_bandwidth=3e11, network_bandwidth=1e10, probed=False,
    )  # fmt: skip
    predicted = Prediction(
        gpu_memory_bytes=31 * GIB, gpu_memory_parts={"weights": 14 * GIB, "optimizer_states": 10 * GIB, "nothing": 0},
        host_memory_bytes_per_node=20 * GIB, checkpoint_bytes=80 * GIB, disk_bytes=254 * GIB, step_seconds=3.2,
        tokens_per_second=91_931.4, total_seconds=7500,
    )  # fmt: skip
    decisions = [
        Decision(field="plan.zero_stage", value=2, reason="the lowest stage that fits"),
        Decision(field="plan.offload_param", value=False, reason="parameters stay on the device"),
        Decision(field="train.learning_rate", value=1e-5, reason="as set", pinned=True),
    ]
    rejected = [Alternative(name=f"way {n}", reason=f"loses by {n}", prediction=predicted) for n in range(6)]
    values: dict[str, Any] = {
        "model": "/cache/models--Qwen--Qwen2.5-7B/snapshots/abc", "method": "full", "parameters": 7_615_616_512,
        "trainable_parameters": 7_615_616_512, "cluster": cluster, "world_size": 16, "precision": "bf16",
        "zero_stage": 2, "offload_optimizer": 0.0, "offload_param": False, "micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4, "gradient_accumulation_dtype": "fp32",
        "checkpointed_layers": 0, "loss_chunk_tokens": 2048,
        "global_batch_size": 128, "max_length": 4096, "packing": True, "learning_rate": 1e-5, "optimizer": "adamw",
        "schedule": "cosine", "warmup_steps": 10, "total_steps": 340, "steps_per_epoch": 340, "checkpoint_every": 50,
        "deepspeed_config": {}, "decisions": decisions, "predicted": predicted, "rejected": rejected,
    }  # fmt: skip
    return Plan(**{**values, **changes})


def make_prepared(**changes: Any) -> PreparedDataset:
    source = SourceSummary(
        path="tales.jsonl", format="question_answer", weight=0.5, rows_read=7473, documents=7461, columns=["question"]
    )
    sample = RenderedSample(pieces=[("What?\x1b[31m ", False), ("Because.", True)], tokens=6, target_tokens=2)
    values: dict[str, Any] = {
        "fingerprint": "f", "fingerprint_parts": {}, "max_length": 1024, "max_length_reason": "covers the longest",
        "vocab_size": 100, "eos_token_id": 0, "pad_token_id": 0, "chat_template": "fallback", "sources": [source],
        "rows_read": 7473,
        "documents": 7312, "validation_documents": 149, "dropped": {"the answer is empty": 12, "too short": 0},
        "duplicates": 3, "truncated_documents": 1, "truncated_tokens": 88, "split_documents": 0, "tokens": 1_240_000,
        "target_tokens": 806_000, "validation_tokens": 24_000, "validation_target_tokens": 15_000, "packs": 1230,
        "fill": 0.981, "longest_document": 998, "samples": [sample], "notes": ["a note"], "seconds": 12.0,
    }  # fmt: skip
    return PreparedDataset(**{**values, **changes})


def make_report(**changes: Any) -> EvaluationReport:
    values: dict[str, Any] = {
        "data": "held-out documents", "documents": 149, "target_tokens": 15_000,
        "base": LossEstimate(loss=2.31, perplexity=10.07, interval=(2.2, 2.4)),
        "tuned": LossEstimate(loss=1.204, perplexity=3.33, interval=(1.1, 1.3)),
        "difference": -1.106, "difference_interval": (-1.2, -1.0), "tasks": {},
        "samples": [GenerationSample(prompt="2+2?", reference="4", base="turtles", tuned="four")],
    }  # fmt: skip
    return EvaluationReport(**{**values, **changes})


@pytest.mark.parametrize("width", WIDTHS)
def test_plan_shows_every_decision_with_its_reason_and_the_prediction(width: int) -> None:
    text = squeezed(drawn(plan_view(make_plan(), width=width), width))
    for part in ("Qwen/Qwen2.5-7B", "all 7.62 B parameters", "16 x A100-40GB on 2 nodes", "as described",
                 "plan.zero_stage", "the lowest stage that fits", "plan.offload_param no", "as set (pinned)", "1e-05",
                 "31.0 GiB", "20.0 GiB", "512 GiB", "3.2 s", "91,931 tokens/s", "2h05m", "340 steps",
                 "254 GiB", "80.0 GiB",
                 "way 0", "loses by 3", "and 2 more: --why shows all"):  # fmt: skip
        assert part in text, part
    assert "way 4" not in text


def test_why_shows_all_alternatives_and_where_the_memory_goes() -> None:
    text = squeezed(drawn(plan_view(make_plan(), why=True, width=100), 100))
    assert "way 5" in text
    assert "optimizer states 10.0 GiB" in text
    assert "nothing" not in text
    assert "--why" not in text


def test_plan_in_one_line() -> None:
    assert tables.plan_summary(make_plan()) == "ZeRO-2 · 16 ranks · 2 x 4 rows · bf16 · 340 steps"
    other = make_plan(world_size=1, offload_optimizer=0.7, method="lora", trainable_parameters=10)
    assert tables.plan_summary(other) == "ZeRO-2 · 1 rank · 2 x 4 rows · offload · LoRA · bf16 · 340 steps"
    assert "10 of 7.62 B parameters" in squeezed(drawn(plan_view(other, width=100), 100))


@pytest.mark.parametrize("width", WIDTHS)
def test_prepared_says_what_was_kept_dropped_and_learned(width: int) -> None:
    text = squeezed(drawn(tables.prepared_view(make_prepared(), width=width), width))
    for part in ("tales.jsonl, as question answer, weight 0.5", "7,473 rows", "7,461 documents", "149 of them held out",
                 "12 rows", "the answer is empty", "duplicates 3", "88 tokens cut off",
                 "1.24 M", "806 k are targets (65%)",
                 "1,230 rows", "98.1% full", "covers the longest", "998 tokens", "ours is used", "note: a note",
                 "⟦Because.⟧", "6 tokens, 2 targets", r"What?\x1b[31m"):  # fmt: skip
        assert part in text, part
    assert "\x1b" not in text
    assert "too short" not in text
    assert "split" not in text


def test_long_samples_keep_both_ends_and_say_what_is_missing() -> None:
    sample = RenderedSample(pieces=[("a" * 200 + "x" * 5000 + "z" * 200, True)], tokens=1, target_tokens=1)
    text = squeezed(drawn(tables.prepared_view(make_prepared(samples=[sample]), width=120), 120)).replace(" ", "")
    assert "5000characters" in text
    assert text.count("x") < 20


@pytest.mark.parametrize("width", WIDTHS)
def test_evaluation_compares_base_and_tuned(width: int) -> None:
    tasks = {"gsm8k": {"documents": 149.0, "base": 0.021, "tuned": 0.113, "difference": 0.092, "difference_low": 0.05,
                       "difference_high": 0.14}}  # fmt: skip
    report = make_report(tasks=tasks, documents_available=1319, notes=["cut at 15,000 tokens"])
    text = squeezed(drawn(tables.evaluation_view(report, width=width), width))
    for part in ("149 of 1,319 documents", "15,000 target tokens", "base", "tuned", "2.310", "1.204", "10.07", "3.33",
                 "-1.106 nats/token", "-1.200 to -1.000", "better", "gsm8k", "2.1%", "11.3%", "+5.0% to +14.0%",
                 "turtles", "four", "cut at 15,000 tokens"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("interval", "verdict"), [((-0.2, -0.1), "better"), ((0.1, 0.2), "worse"), ((-0.1, 0.1), "no difference shown")]
)
def test_the_verdict_is_the_intervals(interval: tuple[float, float], verdict: str) -> None:
    view = tables.evaluation_view(make_report(difference=sum(interval) / 2, difference_interval=interval), width=100)
    assert f": {verdict}" in squeezed(drawn(view, 100))


def test_a_model_alone_is_not_called_tuned() -> None:
    sample = GenerationSample(prompt="2+2?", reference="4", base=None, tuned="four")
    alone = make_report(base=None, difference=None, difference_interval=None, samples=[sample])
    text = squeezed(drawn(tables.evaluation_view(alone, width=100), 100))
    assert "tuned" not in text
    assert "base" not in text
    assert "model four" in text


def test_breakdown_sums_to_the_whole_and_is_sorted() -> None:
    lines = drawn(tables.breakdown_view({"data": 1.0, "backward": 6.0, "other_things": 3.0}, width=80), 80).splitlines()
    assert [line.split()[0] for line in lines] == ["backward", "other", "data"]
    assert ["60.0 %" in lines[0], "30.0 %" in lines[1], "10.0 %" in lines[2]] == [True] * 3
    bars = [line.count("█") for line in lines]
    assert bars[0] == 2 * bars[1]


def test_breakdown_of_nothing_is_no_division_by_zero() -> None:
    assert "0.0 %" in drawn(tables.breakdown_view({"data": 0.0}, width=80), 80)


def test_predicted_against_measured_has_units_and_ratios() -> None:
    quantities = {
        "gpu_memory_bytes": {"predicted": 4 * GIB, "measured": 2 * GIB},
        "step_seconds": {"predicted": 3.2, "measured": 3.52},
        "tokens_per_second": {"predicted": 26_068.0, "measured": 2476.3},
        "checkpoint_bytes": {"predicted": 0, "measured": GIB},
    }
    lines = [squeezed(line) for line in drawn(tables.predicted_view(quantities), 80).splitlines()]
    assert lines == [
        "predicted measured ratio",
        "memory of a rank 4.0 GiB 2.0 GiB 0.50",
        "step 3.2 s 3.5 s 1.10",
        "tokens/s 26,068 2,476 0.09",
        "checkpoint 0 B 1.0 GiB -",
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_findings_show_mends(width: int) -> None:
    findings = [("good", "torch", "2.13", "fine", ""), ("bad", "gpu", "none", "hurts", "buy one")]
    text = squeezed(drawn(tables.findings_view(findings, width=width), width))
    assert text == "✓ torch 2.13 fine ✗ gpu none hurts; mend: buy one"


def test_model_names() -> None:
    assert tables.model_name("/a/b/SmolLM2") == "SmolLM2"
    assert tables.model_name("/h/models--org--name/snapshots/0a1b") == "org/name"
