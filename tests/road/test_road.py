"""The whole road by its real command line: two ranks of real DeepSpeed, interrupted, killed, resumed.

Every command runs with no compiler and no ninja on PATH and with the virtual environment not activated.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from foretune.artifacts import Checkpoint, EvaluationReport, ExportedModel, Plan, RunFolder
from foretune.checkpoint import layout
from foretune.checkpoint.consolidate import iterate_weights
from foretune.events import EventKind, read_events
from foretune.heartbeat import read_heartbeat
from foretune.proving.prove import processes_of

MODEL = Path(__file__).parents[1] / "models" / "stories260K"
TOTAL_STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"question": f"{a} plus {b}?", "answer": f"It is {a + b}."} for a in range(16) for b in range(16)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A PATH with nothing on it: no g++, no ninja, no activated environment."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PATH", "VIRTUAL_ENV")}
    return {**kept, "PATH": str(tmp_path_factory.mktemp("empty-path")), "HF_HUB_OFFLINE": "1"}


def command(data: Path, out: Path, *settings: str, verb: str = "run") -> list[str]:
    flags = ["train.max_length=64", "train.global_batch_size=8", "checkpoint.every=3", "data.num_proc=1"]
    flags += [f"train.max_steps={TOTAL_STEPS}", "train.learning_rate=1e-3", *settings]
    sets = [part for flag in flags for part in ("--set", flag)]
    return [
        sys.executable, "-m", "foretune", verb, "--model", str(MODEL), "--data", str(data), "--out", str(out),
        "--nproc", "2", *sets,
    ]  # fmt: skip


def finish(arguments: list[str], environment: dict[str, str], expected: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == expected, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def steps_of(out: Path) -> list[dict]:
    return [event for event in read_events(out / "events.jsonl") if event["kind"] == EventKind.STEP]


def start(arguments: list[str], environment: dict[str, str], folder: Path) -> tuple[subprocess.Popen, Path]:
    """Start a command; what it prints goes to a file, so that no full pipe ever holds it up."""
    log = folder / "log"
    with log.open("w") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=file, env=environment), log


def wait_for_step(out: Path, step: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 200
    while not any(event["step"] >= step for event in steps_of(out)):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(0.02)


def weights_digest(out: Path) -> str:
    """sha256 over the newest checkpoint's weights."""
    folder = layout.folder_of(out / "checkpoints", layout.complete_steps(out / "checkpoints")[0])
    digest = hashlib.sha256()
    for name, tensor in sorted(iterate_weights(folder), key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def whole_run(data: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ZeRO-2 on two ranks, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finish(command(data, out, "plan.zero_stage=2"), environment)
    return out


def test_every_artifact_is_there_and_it_learned(whole_run: Path) -> None:
    run = RunFolder(whole_run)
    plan = Plan.read(run.plan)
    assert (plan.zero_stage, plan.world_size, plan.total_steps) == (2, 2, TOTAL_STEPS)
    assert json.loads(run.deepspeed_config.read_text())["zero_optimization"]["stage"] == 2
    losses = [event["loss"] for event in steps_of(whole_run)]
    assert len(losses) == TOTAL_STEPS
    assert losses[-1] < losses[0] - 0.3
    report = EvaluationReport.read(run.evaluation)
    assert report.base is not None
    assert report.difference_interval is not None
    assert report.difference_interval[1] < 0, "better, with the whole interval"
    kinds = {event["kind"] for event in read_events(run.events)}
    assert kinds >= {EventKind.BREAKDOWN, EventKind.PREDICTED_AGAINST_MEASURED, EventKind.CHECKPOINT_SAVED}
    page = run.report.read_text(encoding="utf-8")
    assert "✓ complete" in page
    assert all(f'id="{section}"' in page for section in ("data", "plan", "training", "evaluation", "model"))
    assert whole_run.stat().st_mode & 0o077 == 0, "private to its owner"
    assert not processes_of(whole_run)


def test_the_export_is_a_plain_model(whole_run: Path) -> None:
    manifest = ExportedModel.read(whole_run / "export" / ExportedModel.file_name)
    assert manifest.max_logit_difference <= manifest.logit_tolerance
    model = AutoModelForCausalLM.from_pretrained(whole_run / "export")
    tokenizer = AutoTokenizer.from_pretrained(whole_run / "export")
    question = [{"role": "user", "content": "3 plus 4?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    ids = prompt["input_ids"] if not isinstance(prompt, torch.Tensor) else prompt
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape[1] > ids.shape[1]


def test_the_same_command_again_skips_everything(whole_run: Path, data: Path, environment: dict[str, str]) -> None:
    before = len(steps_of(whole_run))
    start = time.monotonic()
    done = finish(command(data, whole_run, "plan.zero_stage=2"), environment)
    assert len(steps_of(whole_run)) == before
    assert "already done" in done.stderr
    assert time.monotonic() - start < 60


def test_interrupted_and_resumed_equals_uninterrupted(
    whole_run: Path, data: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Ctrl-C: the step is finished, saved, exit 75; the same command again ends in the same bits and losses."""
    out = tmp_path / "interrupted"
    arguments = command(data, out, "plan.zero_stage=2", verb="train")
    process, log = start(arguments, environment, tmp_path)
    wait_for_step(out, 2, process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 75, log.read_text()
    stopped_at = layout.complete_steps(out / "checkpoints")[0]
    assert 2 <= stopped_at < TOTAL_STEPS
    assert "same command" in log.read_text()
    assert not processes_of(out)
    finish(arguments, environment)
    assert weights_digest(out) == weights_digest(whole_run)
    assert [e["loss"] for e in steps_of(out)] == [e["loss"] for e in steps_of(whole_run)]
    started = [e for e in read_events(out / "events.jsonl") if e["kind"] == EventKind.TRAINING_STARTED]
    assert started[-1]["resumed_from"] == f"step-{stopped_at:08d}"


def test_a_killed_rank_costs_some_steps_and_nothing_else(
    data: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """The same command goes on by itself to the end, and says what happened. LoRA at ZeRO-3, the hardest to save."""
    out = tmp_path / "killed"
    arguments = command(data, out, "plan.zero_stage=3", "method=lora", "lora.r=4")
    process, log = start(arguments, environment, tmp_path)
    wait_for_step(out, 4, process, log)
    beat = read_heartbeat(RunFolder(out).heartbeat_of(1))
    assert beat is not None
    os.kill(beat.pid, signal.SIGKILL)
    assert process.wait(200) == 0, log.read_text()
    assert "ended by SIGKILL, rank 1" in log.read_text()
    assert "from the last good checkpoint" in log.read_text()
    assert not processes_of(out)
    started = [e for e in read_events(out / "events.jsonl") if e["kind"] == EventKind.TRAINING_STARTED]
    assert [event["resumed_from"] for event in started] in (
        [None, "step-00000003"],
        [None, "step-00000006"],
    ), "the newest checkpoint at the moment of the kill"
    manifest = Checkpoint.read(out / "checkpoints" / f"step-{TOTAL_STEPS:08d}" / layout.MANIFEST)
    assert (manifest.zero_stage, manifest.method) == (3, "lora")
    kinds = {ExportedModel.read(path).kind for path in (out / "export").glob(f"*/{ExportedModel.file_name}")}
    assert kinds == {"adapter", "merged"}
    assert EvaluationReport.read(out / "evaluation.json").difference is not None


def test_what_recovery_may_not_mend_ends_with_its_diagnosis(
    data: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """No restart allowed: exit 4, the rank and the last good checkpoint are named, and the same command goes on."""
    out = tmp_path / "stopped"
    arguments = command(data, out, "plan.zero_stage=2", "recover.restarts_per_hour=0", verb="train")
    process, log = start(arguments, environment, tmp_path)
    wait_for_step(out, 4, process, log)
    beat = read_heartbeat(RunFolder(out).heartbeat_of(0))
    assert beat is not None
    os.kill(beat.pid, signal.SIGKILL)
    assert process.wait(120) == 4, log.read_text()
    text = log.read_text()
    assert "ended by SIGKILL" in text
    assert "on rank 0" in text
    assert "last good checkpoint" in text
    assert "✗ stopped by a fault" in (out / "report.html").read_text(encoding="utf-8")
    assert not processes_of(out)
    finish(arguments, environment)
    assert layout.complete_steps(out / "checkpoints")[0] == TOTAL_STEPS


def test_ranks_die_with_a_killed_supervisor(data: Path, environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "orphans"
    process, log = start(command(data, out, verb="train"), environment, tmp_path)
    wait_for_step(out, 1, process, log)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while processes_of(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(out), "a rank that trains on holds the device and writes into the run"
