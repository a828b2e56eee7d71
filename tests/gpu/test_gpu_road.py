"""The whole road on a GPU, a model of the Qwen2.5-0.5B shape (random weights): full and LoRA, ZeRO-1 to 3, fp16.

And that what was compiled is found again by the next start.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from foretune.artifacts import EvaluationReport, ExportedModel, Plan, RunFolder
from foretune.events import EventKind, read_events

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
]
TOKENIZER = Path(__file__).parents[1] / "models" / "stories260K"
STEPS = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM, Qwen2Config

    folder = tmp_path_factory.mktemp("model") / "qwen2-0.5b-shape"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"question": f"{a} plus {b}?", "answer": f"It is {a + b}."} for a in range(150) for b in range(100)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize(
    ("method", "stage", "precision", "pins", "gpus"),
    [
        ("full", 1, "bf16", [], 1),
        ("full", 1, "bf16", ["plan.offload_optimizer=0.7", "plan.offload_optimizer_step=device"], 1),
        ("full", 1, "bf16", ["allow_numerics=true", "plan.optimizer_dtype=8bit"], 1),
        ("full", 3, "bf16", [], 1),
        ("lora", 1, "bf16", [], 1),
        ("lora", 3, "bf16", [], 1),
        ("full", 2, "fp16", [], 1),
        ("full", 1, "bf16", [], 2),
        ("full", 2, "bf16", [], 2),
        ("full", 3, "bf16", [], 2),
        ("lora", 1, "bf16", [], 2),
    ],
    ids=["full-1", "full-1-streamed", "full-1-8bit", "full-3", "lora-1", "lora-3", "full-2-fp16",
         "two-full-1", "two-full-2", "two-full-3", "two-lora-1"],
)  # fmt: skip
def test_the_road_holds(
    method: str, stage: int, precision: str, pins: list[str], gpus: int, *, model: Path, data: Path, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    out = tmp_path / "run"
    sets = [f"plan.zero_stage={stage}", f"method={method}", f"train.max_steps={STEPS}", "train.max_length=1024"]
    sets += ["train.global_batch_size=16", "evaluate.validation=0.01", *pins]
    if precision != "bf16":  # what a GPU with bf16 gets by itself
        sets.append(f"train.precision={precision}")
    if method == "full":
        sets.append("train.learning_rate=3e-4")
    else:
        sets.append("train.learning_rate=2e-3")
    arguments = [sys.executable, "-m", "foretune", "run", "--model", str(model), "--data", str(data), "--out", str(out)]
    arguments += ["--nproc", str(gpus), *(part for item in sets for part in ("--set", item))]
    start = time.monotonic()
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=400, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    seconds = time.monotonic() - start
    logs = "".join(path.read_text()[-3000:] for path in sorted((out / "logs").glob("*.log")))
    assert done.returncode == 0, done.stderr[-3000:] + logs
    run = RunFolder(out)
    plan = Plan.read(run.plan)
    assert (plan.zero_stage, plan.method, plan.precision, plan.world_size) == (stage, method, precision, gpus)
    assert (plan.optimizer_dtype == "8bit") == ("plan.optimizer_dtype=8bit" in pins)
    assert plan.streams_optimizer == ("plan.offload_optimizer_step=device" in pins)
    steps = [event for event in read_events(run.events) if event["kind"] == EventKind.STEP]
    assert len(steps) == STEPS
    assert steps[-1]["loss"] < steps[0]["loss"] - 1.0
    report = EvaluationReport.read(run.evaluation)
    assert report.difference is not None
    assert report.difference < -1.0
    manifests = [ExportedModel.read(path) for path in run.export.rglob(ExportedModel.file_name)]
    assert manifests
    assert all(m.max_logit_difference <= m.logit_tolerance for m in manifests)
    settled = sorted(event["seconds"] for event in steps[3:])
    figures = {
        "method": method,
        "gpus": gpus,
        "zero_stage": stage,
        "precision": precision,
        "device": torch.cuda.get_device_name(),
        "seconds": round(seconds, 1),
        "micro_batch": f"{plan.micro_batch_size_per_gpu} x {plan.gradient_accumulation_steps}",
        "loss": [round(steps[0]["loss"], 3), round(steps[-1]["loss"], 3)],
        "step_seconds": round(settled[len(settled) // 2], 4),
        "tokens_per_second": round(steps[-1]["tokens"] / settled[len(settled) // 2]),
        "peak_gib": round(max(event["memory_bytes"] for event in steps) / 2**30, 2),
        "predicted_gib": round(plan.predicted.gpu_memory_bytes / 2**30, 2),
        "predicted_step_seconds": round(plan.predicted.step_seconds, 4),
        "logit_difference": [m.max_logit_difference for m in manifests],
        "difference": round(report.difference, 3),
    }
    print("FIGURES " + json.dumps(figures))


def test_a_second_start_compiles_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    sets = ["plan.zero_stage=1", "plan.compile=true", "train.max_steps=3", "train.max_length=1024"]
    sets += ["train.global_batch_size=16", "evaluate.validation=0"]
    losses, kept = [], []
    for out in (tmp_path / "first", tmp_path / "second"):
        arguments = [
            sys.executable, "-m", "foretune", "train", "--model", str(model), "--data", str(data), "--out", str(out),
            "--nproc", "1",
        ]  # fmt: skip
        arguments += [part for item in sets for part in ("--set", item)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=400, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        events = list(read_events(out / "events.jsonl"))
        losses.append([event["loss"] for event in events if event["kind"] == EventKind.STEP])
        cache = tmp_path / ".cache" / "foretune" / "compiled"
        # Traces of autograd, graphs, and the folder of the kernels' code.
        kept.append({str(file.relative_to(cache)) for file in cache.rglob("*") if file.is_file()})
        traced = next(event["seconds"] for event in events if event["kind"] == EventKind.STEP)
        notes = [event["message"] for event in events if event["kind"] == EventKind.NOTE]
        (compiled,) = (note for note in notes if note.startswith("compiled"))
        print(f"FIGURES first step {traced:.1f} s, {len(kept[-1])} files, {compiled}")
    graphs, found = re.fullmatch(r"compiled (\d+) graphs in 2 steps, (\d+) of them found on disk", compiled).groups()
    assert int(graphs) == int(found) > 0
    assert losses[0][0] == losses[1][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # attention's gradients are added up in any order
    assert any(name.startswith("aotautograd") for name in kept[0])
    assert kept[0] == kept[1]
