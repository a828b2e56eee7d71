"""The end of the road: a page that can't be written takes nothing away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from foretune.artifacts import RunFolder
from foretune.config import parse_config, to_yaml
from foretune.events import EventKind, Journal
from foretune.pipeline.road import _Road


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
