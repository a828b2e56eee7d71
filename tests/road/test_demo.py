"""The demo: its road with a tiny model in the place of its own, and (slow) the demo itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foretune import pipeline
from foretune.artifacts import RunFolder
from foretune.events import EventKind, read_events
from foretune.model.source import default_cache, has_weights

STORIES = Path(__file__).parents[1] / "models" / "stories260K"
pytest.importorskip("uvicorn", reason="the demo ends with a question over HTTP, which needs foretune[serve]")


def test_the_demos_road_with_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told: list[str] = []

    def demonstrate() -> pipeline.DemoResult:
        told.clear()
        return pipeline.demonstrate(
            out=tmp_path / "demo",
            nproc=2,
            model=STORIES,
            changes={"max_steps": 2},
            on_event=lambda event: told.append(f"{event['kind']} {event.get('stage', '')}"),
        )

    first = demonstrate()
    run = RunFolder(tmp_path / "demo")
    assert [stage for stage in pipeline.DEMO_STAGES if f"stage_finished {stage}" in told] == list(pipeline.DEMO_STAGES)
    assert 0 <= first.base.f1 <= 1
    assert 0 <= first.tuned.valid_json <= 1
    assert first.sentences == 48
    assert first.question
    assert first.run.exported[0].step == 2
    stages = {event.get("stage") for event in read_events(run.events) if event["kind"] == EventKind.STAGE_FINISHED}
    assert {"measure", "ask"} <= stages  # the journal tells the demo's own stages too
    measured = (run.path / "demo.json").stat().st_mtime_ns
    again = demonstrate()
    assert (again.base, again.tuned, again.question, again.answer) == (
        first.base, first.tuned, first.question, first.answer)  # fmt: skip
    assert (run.path / "demo.json").stat().st_mtime_ns == measured
    assert "stage_skipped train" in told


@pytest.mark.slow
def test_the_demo_itself_shows_a_skill(tmp_path: Path) -> None:
    folder = default_cache() / "SmolLM2-135M-Instruct"
    if not has_weights(folder):
        pytest.skip(f"the demo's model is not in {folder}; `foretune demo` fetches it")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "foretune", "demo", "--out", str(tmp_path / "demo"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["tuned"]["valid_json"] >= 0.95
    assert shown["tuned"]["f1"] >= shown["base"]["f1"] + 0.2
    assert isinstance(json.loads(shown["answer"]), list)
