"""The demo: the road on the embedded model and data, then proof that it learned, then one question over HTTP.

    fetch ─▶ prepare ─▶ plan ─▶ train ─▶ evaluate ─▶ export ─▶ measure base and tuned ─▶ serve, ask

A demo that was interrupted goes on where it ended, like any run; what was measured is kept in OUT/demo.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from foretune.artifacts import RunFolder, write_atomically
from foretune.config import parse_config
from foretune.events import EventKind, Journal
from foretune.model.source import default_cache
from foretune.pipeline.folder import default_out
from foretune.pipeline.road import STAGES, EventSink, RunResult, hide_progress_bars, travel
from foretune.reporting.results import demo_view

#: What a view of the demo shows, in order.
DEMO_STAGES = ("fetch", *STAGES, "measure", "ask")
MEASURED = "demo.json"
_ANSWER_SECONDS = 120.0


@dataclass(frozen=True)
class Score:
    """Shares between 0 and 1 over the held-out sentences."""

    valid_json: float
    f1: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo showed. The base model is given three worked examples with each question, the tuned one none."""

    run: RunResult
    base: Score
    tuned: Score
    sentences: int
    question: str
    answer: str  # of the served model, over HTTP
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "run": self.run.as_json()}

    def view(self) -> list[RenderableType]:
        """For people."""
        scores = [
            ("valid JSON", self.base.valid_json, self.tuned.valid_json),
            ("triple F1", self.base.f1, self.tuned.f1),
        ]
        return demo_view(scores, sentences=self.sentences, question=self.question, answer=self.answer, out=self.run.out)


def demonstrate(
    *,
    out: Path | None = None,
    seed: int = 0,
    nproc: int | None = None,
    model: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    on_event: EventSink = lambda event: None,
) -> DemoResult:
    """Run the demo.

    Args:
        out: run folder; derived as for any run if not given.
        seed: of training.
        nproc: ranks; one per GPU, or as planned for a CPU, if not given.
        model: a model folder to use instead of the demo's own.
        changes: keys of `train` to set otherwise.
        on_event: called with every event.

    Raises:
        ForetuneError: as `travel`; also where the model can't be fetched or served.
    """
    from foretune.demo import TEST_FILE, demo_config, fetch_smollm2

    began = time.perf_counter()
    with _told_stage("fetch", on_event) as stage:
        folder = model or fetch_smollm2(default_cache(), on_progress=stage.say)
        stage.summary = str(folder)
    values = demo_config(folder)
    values["train"] = {**values["train"], "seed": seed, **(changes or {})}
    config = parse_config(values)
    result = travel(config, out=out or default_out(config), nproc=nproc, on_event=on_event)
    run = RunFolder(result.out)
    journal = Journal(run.events)

    def tell(event: Mapping[str, Any]) -> None:
        kind = EventKind(event["kind"])
        on_event(journal.write(kind, **{key: value for key, value in event.items() if key not in ("kind", "time")}))

    try:
        with _told_stage("measure", tell) as stage:
            scores = _measure(folder, run, stage.say)
            base, tuned = Score(**scores["base"]), Score(**scores["tuned"])
            stage.summary = f"triple F1 {base.f1:.1%} → {tuned.f1:.1%}"
        with _told_stage("ask", tell) as stage:
            question, answer = _ask(run.export, TEST_FILE, stage.say)
            stage.summary = answer
    finally:
        journal.close()
    seconds = time.perf_counter() - began
    return DemoResult(result, base, tuned, scores["sentences"], question, answer, round(seconds, 1))


def _measure(base: Path, run: RunFolder, say: Callable[[str], None]) -> dict[str, Any]:
    """Scores of the base model and of the export, as OUT/demo.json keeps them for this export."""
    from foretune.demo import measure

    path = run.path / MEASURED
    export = str((run.export / "foretune.json").stat().st_mtime_ns)
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if known["export"] == export:
            return known
    hide_progress_bars()
    scores: dict[str, Any] = {"export": export}
    for name, folder, few_shot in (("base", base, True), ("tuned", run.export, False)):
        say(f"the {name} model answers the held-out sentences")
        measured = measure(folder, few_shot=few_shot)
        scores[name] = {"valid_json": measured.score.valid_json, "f1": measured.score.f1}
        scores["sentences"] = len(measured.sentences)
    write_atomically(path, json.dumps(scores, indent=2) + "\n")
    return scores


def _ask(export: Path, test_file: Path, say: Callable[[str], None]) -> tuple[str, str]:
    """Serve the export, ask the first held-out question as any client would, and stop the server."""
    from foretune.serving import running_server

    messages = json.loads(test_file.read_text(encoding="utf-8").partition("\n")[0])["messages"][:-1]
    say("starting a server")
    with running_server(export) as base_url:
        say(f"asking {base_url}/chat/completions")
        body = {"model": _served_name(base_url), "messages": messages, "max_tokens": 80, "temperature": 0}
        answered = _answer_of(f"{base_url}/chat/completions", body)
    return str(messages[-1]["content"]), str(answered["choices"][0]["message"]["content"]).strip()


def _served_name(base_url: str) -> str:
    return str(_answer_of(f"{base_url}/models")["data"][0]["id"])


def _answer_of(url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a server of ours answers: to a GET, or to this body."""
    from urllib.request import Request, urlopen  # brings in TLS, which a plan does not need: 60 ms

    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=_ANSWER_SECONDS) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


@dataclass
class _Stage:
    """A stage of the demo's own, while it runs."""

    name: str
    tell: EventSink
    summary: str = ""

    def say(self, message: str) -> None:
        """What is being done now."""
        self.tell({"kind": EventKind.PROGRESS, "stage": self.name, "message": message, "time": time.time()})


@contextmanager
def _told_stage(name: str, tell: EventSink) -> Iterator[_Stage]:
    """Tell the start of a stage, and its end with the summary that it was given."""
    tell({"kind": EventKind.STAGE_STARTED, "stage": name, "time": time.time()})
    began = time.perf_counter()
    stage = _Stage(name, tell)
    yield stage
    ended = {"seconds": round(time.perf_counter() - began, 3), "summary": stage.summary, "time": time.time()}
    tell({"kind": EventKind.STAGE_FINISHED, "stage": name, **ended})
