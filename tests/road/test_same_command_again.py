"""The same command again: what is complete is left alone, what is missing is made, what would mix is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from warm_commands import RunCommand, warm_commands

from foretune.artifacts import Checkpoint, EvaluationReport, ExportedModel, Plan, RunFolder
from foretune.checkpoint import layout
from foretune.events import EventKind, read_events
from foretune.proving.digest import losses, relative_difference

MODEL = Path(__file__).parents[1] / "models" / "stories260K"
STEPS = 3
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tales.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"Once upon a time there was a cat who had {n} toys."}) + "\n" for n in range(300))
    )
    return path


@pytest.fixture(scope="module")
def command() -> Iterator[Command]:
    """Runs ``foretune VERB`` on data, into a run folder, as a fork."""
    with warm_commands() as warm:
        yield partial(_run, warm)


def _run(warm: RunCommand | None, verb: str, data: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """In a fresh process if there is no warm one."""
    words = [verb, "--model", str(MODEL), "--data", str(data), "--out", str(out), "--nproc", "2", "--json"]
    settings = [
        f"train.max_steps={STEPS}",
        "train.global_batch_size=4",
        "train.max_length=128",
        "evaluate.validation=0.05",
        "checkpoint.every=2",
    ]
    words += [word for setting in settings for word in ("--set", setting)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if warm is not None:
        return warm([*words, *more], environment=environment, timeout=300)
    command = [sys.executable, "-m", "foretune", *words, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went the whole road, by a fresh process: what libraries print as they are imported spoils no JSON."""
    out = tmp_path_factory.mktemp("runs") / "first"
    done = _run(None, "run", data, out)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["out"] == str(out)
    assert told["checkpoint"].endswith(f"step-{STEPS:08d}")
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def stages(out: Path, kind: EventKind) -> list[str]:
    """The stages of the latest command that ended in a way."""
    events = list(read_events(out / "events.jsonl"))
    last = max(index for index, event in enumerate(events) if event["kind"] == EventKind.RUN_STARTED)
    return [event["stage"] for event in events[last:] if event["kind"] == kind]


def files_of(out: Path) -> dict[str, tuple[int, int]]:
    """Every artifact's size and time of change."""
    left_out = ("events.jsonl", ".lock")
    paths = [path for path in out.rglob("*") if path.is_file() and path.name not in left_out]
    return {str(path.relative_to(out)): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def test_the_road_leaves_every_artifact(finished: Path) -> None:
    run = RunFolder(finished)
    plan = Plan.read(run.plan)
    assert (plan.world_size, plan.total_steps) == (2, STEPS)
    assert json.loads(run.deepspeed_config.read_text()) == plan.deepspeed_config
    assert EvaluationReport.read(run.evaluation).base is not None
    assert ExportedModel.read(run.export / ExportedModel.file_name).step == STEPS
    assert stages(finished, EventKind.STAGE_FINISHED) == ["prepare", "plan", "train", "evaluate", "export"]
    kinds = [event["kind"] for event in read_events(run.events)]
    assert kinds.count(EventKind.STEP) == STEPS
    assert kinds.count(EventKind.BREAKDOWN) == kinds.count(EventKind.PREDICTED_AGAINST_MEASURED) == 1


def test_again_touches_nothing_and_says_so(command: Command, out: Path, data: Path) -> None:
    before = files_of(out)
    done = command("run", data, out)
    assert done.returncode == 0, done.stderr
    assert stages(out, EventKind.STAGE_SKIPPED) == ["prepare", "plan", "train", "evaluate", "export"]
    assert stages(out, EventKind.STAGE_FINISHED) == []
    assert done.stderr.count("already done") == 5
    assert files_of(out) == before


def test_what_is_missing_is_made_again(command: Command, out: Path, data: Path) -> None:
    RunFolder(out).evaluation.unlink()
    shutil.rmtree(RunFolder(out).export)
    done = command("run", data, out)
    assert done.returncode == 0, done.stderr
    assert stages(out, EventKind.STAGE_SKIPPED) == ["prepare", "plan", "train"]
    assert stages(out, EventKind.STAGE_FINISHED) == ["evaluate", "export"]


def test_training_that_lost_its_last_checkpoint_goes_on_from_the_one_before(
    command: Command, out: Path, data: Path
) -> None:
    checkpoints = RunFolder(out).checkpoints
    newest, *older = layout.complete_steps(checkpoints)
    assert newest == STEPS
    assert older, "it saved before the last step too"
    (layout.folder_of(checkpoints, newest) / layout.MANIFEST).unlink()
    done = command("train", data, out)
    assert done.returncode == 0, done.stderr
    assert f"going on after step {older[0]}" in done.stderr
    assert layout.complete_steps(checkpoints)[0] == STEPS


@pytest.mark.parametrize(
    ("ranks", "stage"), [(1, 3), (3, 1)], ids=["fewer ranks, another stage", "more ranks, another stage"]
)
def test_a_training_goes_on_with_other_ranks_at_another_stage(
    command: Command, finished: Path, out: Path, data: Path, *, ranks: int, stage: int
) -> None:
    """A machine that lost a GPU, or won some: the same batches, and what rounding leaves of a difference."""
    checkpoints = RunFolder(out).checkpoints
    newest, *older = layout.complete_steps(checkpoints)
    shutil.rmtree(layout.folder_of(checkpoints, newest))
    done = command("run", data, out, "--nproc", str(ranks), "--set", f"plan.zero_stage={stage}")
    assert done.returncode == 0, done.stderr
    assert f"step-{older[0]:08d} is of 2 ranks at ZeRO-" in done.stderr
    assert "equal within rounding" in done.stderr
    manifest = Checkpoint.read(layout.folder_of(checkpoints, newest) / layout.MANIFEST)
    assert (manifest.world_size, manifest.zero_stage) == (ranks, stage)
    assert ExportedModel.read(RunFolder(out).export / ExportedModel.file_name).step == STEPS
    whole = layout.folder_of(RunFolder(finished).checkpoints, newest)
    begin = layout.folder_of(checkpoints, older[0])
    assert 0 < relative_difference(layout.folder_of(checkpoints, newest), whole, begin) < 1e-3
    then, now = (losses(RunFolder(folder))[newest] for folder in (finished, out))
    assert max(now) == pytest.approx(max(then), rel=1e-5)


@pytest.mark.parametrize(
    ("more", "field", "problem"),
    [
        (("--set", "train.seed=1"), "--out", "train.seed was 0, is now 1"),
        (("--set", "train.precision=bf16"), "--out", "train.precision was 'auto', is now 'bf16'"),
    ],
    ids=["seed", "precision"],
)
def test_what_would_mix_is_refused_and_changes_nothing(
    command: Command, out: Path, data: Path, *, more: tuple[str, ...], field: str, problem: str
) -> None:
    before = files_of(out)
    done = command("run", data, out, *more)
    assert done.returncode == 2, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["field"] == field
    assert problem in error["problem"]
    assert "--out" in error["mend"]
    assert files_of(out) == before
    assert command("run", data, out).returncode == 0


def test_data_that_changed_after_training_is_refused_until_it_is_put_back(
    command: Command, out: Path, data: Path
) -> None:
    content = data.read_text()
    try:
        data.write_text(content + json.dumps({"text": "a tale that was not there before"}) + "\n")
        done = command("run", data, out)
    finally:
        data.write_text(content)
    assert done.returncode == 2, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["field"] == "data"
    assert "has changed since training began" in error["problem"]
    assert "put the old file back" in error["mend"]
    assert command("run", data, out).returncode == 0
