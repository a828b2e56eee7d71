"""What the road refuses to carry over, and its end: a page that can't be written takes nothing away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from foretune import launch, planning
from foretune.artifacts import Checkpoint, Plan, RunFolder
from foretune.checkpoint import layout, store
from foretune.config import parse_config, to_yaml
from foretune.errors import UserError
from foretune.events import EventKind, Journal
from foretune.pipeline.road import _Road
from foretune.planning import make_plan, parse_hardware


@pytest.fixture
def told() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def road(tmp_path: Path, told: list[dict[str, Any]]) -> _Road:
    run, config = RunFolder(tmp_path / "run"), parse_config({"model": "m", "data": "d.jsonl"})
    run.create()
    run.config.write_text(to_yaml(config), encoding="utf-8")
    journal = Journal(run.events)
    return _Road(run, config, nproc=None, same_wishes=False, journal=journal, on_event=lambda e: told.append(dict(e)))


def test_the_report_is_written(road: _Road) -> None:
    assert road.report() == road.run.report
    assert "begun" in road.run.report.read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_is_a_note(road: _Road, told: list[dict[str, Any]]) -> None:
    road.run.report.mkdir()
    assert road.report() is None
    assert told[-1]["kind"] == EventKind.NOTE
    assert told[-1]["message"].startswith("no report was written: UserError: --out")
    assert "\n" not in told[-1]["message"]


def begun(road: _Road, *, step: int = 5, vectors_apart: bool = False, **pins: Any) -> Plan:
    """A run of a 7B model with a plan and a checkpoint's manifest."""
    values = {"model": "Qwen2.5-7B", "data": "d.jsonl", "allow_numerics": True, "train": {"max_length": 1024}}
    config = parse_config({**values, "plan": pins})
    plan = make_plan(config, model_folder="Qwen2.5-7B", cluster=parse_hardware("4xH100,ram=1TB"), prepared=None)
    road.run.write_plan(plan)
    manifest = Checkpoint(
        step=step, world_size=plan.world_size, zero_stage=plan.zero_stage, precision=plan.precision,
        method=plan.method, fingerprint="0" * 64, train_state={}, files={},
        vectors_apart=vectors_apart,
    )  # fmt: skip
    manifest.write(layout.folder_of(road.run.checkpoints, step) / layout.MANIFEST)
    return plan


def test_ranks_and_stage_may_be_others(road: _Road) -> None:
    plan = begun(road, zero_stage=2)
    road._refuse_other_plan(plan.model_copy(update={"zero_stage": 3, "world_size": 2}))


@pytest.mark.parametrize(
    ("pins", "now", "field"),
    [
        ({"optimizer_dtype": "fp32"}, {"optimizer_dtype": "bf16"}, "plan.optimizer_dtype"),
        ({"optimizer_dtype": "fp32"}, {"gradient_accumulation_dtype": "bf16"}, "plan.gradient_accumulation_dtype"),
        ({"zero_stage": 2}, {"learning_rate": 1.0}, "plan.learning_rate"),
        ({"optimizer_dtype": "8bit"}, {"world_size": 3}, "--nproc"),
        ({"optimizer_dtype": "8bit"}, {"zero_stage": 2}, "plan.zero_stage"),
        ({"zero_stage": 3, "offload_optimizer": 0.5}, {"offload_optimizer": 1.0}, "plan.offload_optimizer"),
        ({"zero_stage": 3, "offload_optimizer": 0.5}, {"world_size": 2}, "--nproc"),
    ],
)
def test_other_numbers_are_refused(road: _Road, pins: dict[str, Any], now: dict[str, Any], field: str) -> None:
    plan = begun(road, **pins)
    with pytest.raises(UserError, match="were made with") as error:
        road._refuse_other_plan(plan.model_copy(update=now))
    assert error.value.field == field
    assert "--out" in error.value.mend


def test_a_begun_run_is_planned_with_its_own_numbers(road: _Road) -> None:
    """With leave to change them, a smaller machine would have got bf16 masters midway."""
    assert road._as_begun().plan.optimizer_dtype == "auto"
    plan = begun(road, optimizer_dtype="fp32")
    asked = road._as_begun().plan
    assert (asked.optimizer_dtype, asked.gradient_accumulation_dtype) == ("fp32", plan.gradient_accumulation_dtype)


@pytest.mark.parametrize("apart", [None, True, False])
def test_a_begun_run_keeps_its_optimizers_groups(
    road: _Road, apart: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its newest checkpoint that can be read says, also where its plan has been lost."""
    if apart is not None:
        begun(road, step=5, vectors_apart=apart)
        begun(road, step=6, vectors_apart=apart)
        (layout.folder_of(road.run.checkpoints, 6) / layout.MANIFEST).write_text("{", encoding="utf-8")
        (road.run.path / Plan.file_name).unlink()
    given: list[Any] = []

    def planned(config: Any, **how: Any) -> None:
        given.append(how["vectors_apart"])
        raise UserError("model", "m", "that is enough", "none")

    monkeypatch.setattr(planning, "make_plan", planned)
    with pytest.raises(UserError, match="enough"):
        road.plan(Path("Qwen2.5-7B"), None)  # type: ignore[arg-type]
    assert given == [apart]


def test_a_complete_training_keeps_its_plan(road: _Road) -> None:
    """Whatever machine and whichever keys of the plan the same command is given afterwards."""
    plan = begun(road, zero_stage=2)
    road.data_reused = True
    elsewhere = parse_hardware("1xcpu")
    assert road._plan_on_disk(Path("Qwen2.5-7B"), elsewhere) is None
    begun(road, step=plan.total_steps, zero_stage=2)
    kept = road._plan_on_disk(Path("Qwen2.5-7B"), elsewhere)
    assert kept is not None
    assert kept.world_size == 4


def test_training_does_not_read_checkpoints_that_others_verify(
    road: _Road, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading back all of a 1.5B training took half a minute: the ranks do so before they go on, the launcher at the
    end. A command that finds a complete training reads it itself."""
    plan = begun(road, zero_stage=2)

    def trained(run: RunFolder, plan: Plan, *_: Any, **__: Any) -> None:
        begun(road, step=plan.total_steps, zero_stage=2)

    verified: list[str] = []

    def verify(folder: Path) -> Checkpoint:
        verified.append(folder.name)
        return Checkpoint.read(folder / layout.MANIFEST)

    monkeypatch.setattr(launch, "train", trained)
    monkeypatch.setattr(store, "verify", verify)
    last = layout.folder_of(road.run.checkpoints, plan.total_steps)
    assert road.train(plan) == last
    assert told[-1]["kind"] == EventKind.STAGE_FINISHED
    assert not verified
    assert road.train(plan) == last
    assert told[-1]["kind"] == EventKind.STAGE_SKIPPED
    assert verified == [last.name]
