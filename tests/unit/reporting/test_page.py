"""The page: every section from the artifacts that are there, whatever is missing; escaped; without anything outside."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from foretune.artifacts import (
    Checkpoint,
    EvaluationReport,
    ExportedModel,
    GenerationSample,
    LossEstimate,
    Outcome,
    PreparedDataset,
    RankFile,
    RenderedSample,
    RunFolder,
    SourceSummary,
)
from foretune.checkpoint import layout
from foretune.config import parse_config, to_yaml
from foretune.errors import UserError
from foretune.events import EventKind
from foretune.planning import make_plan, parse_hardware
from foretune.reporting.page import write_report
from foretune.reporting.page.material import read_material
from foretune.reporting.page.render import _Shown

#: What data, models and notes may hold.
EVIL = "<script>alert(1)</script>\x1b[31m\u202e&\"'"
SHOWN = "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m\\x202e&amp;&#34;&#39;"


class Page(HTMLParser):
    """Tags, attributes and text of a page; balanced tags are asserted."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.words += "" if tag == "wbr" else " "
        if tag not in ("meta", "br", "wbr"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self.words += " "

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words += data

    @property
    def text(self) -> str:
        return " ".join(self.words.split())

    @property
    def sections(self) -> list[str | None]:
        return [values.get("id") for tag, values in self.tags if tag == "section"]


def page_of(folder: Path, **options: Any) -> Page:
    return Page(write_report(folder, **options).read_text(encoding="utf-8"))


class Run:
    """A run folder whose artifacts are added one by one."""

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.time = 1_700_000_000.0
        self.folder.create()
        config = parse_config({"model": "Qwen2.5-7B", "data": "/somewhere/private/tales.jsonl", "method": "lora"})
        self.folder.config.write_text(to_yaml(config), encoding="utf-8")
        self.tell(EventKind.RUN_STARTED, versions={"foretune": "0.1.0", "torch": "2.13.0"})

    def tell(self, kind: EventKind, *, after: float = 1.0, **payload: Any) -> None:
        self.time += after
        with self.folder.events.open("a") as file:
            file.write(json.dumps({"time": self.time, "kind": str(kind), **payload}) + "\n")

    def prepare(self) -> None:
        source = SourceSummary(
            path=f"/a/{EVIL.replace('/', '')}", format="text", weight=0.5, rows_read=7473, documents=7461, columns=[]
        )
        PreparedDataset(
            fingerprint="f", fingerprint_parts={}, max_length=1024, max_length_reason="covers the longest",
            vocab_size=9, eos_token_id=0, pad_token_id=0, chat_template="fallback", sources=[source], rows_read=7473,
            documents=7312, validation_documents=149, dropped={f"the answer is {EVIL}": 12, "too short": 0},
            duplicates=3, truncated_documents=1, truncated_tokens=88, split_documents=0, tokens=1_240_000,
            target_tokens=806_000, validation_tokens=9, validation_target_tokens=9, packs=1230, fill=0.981,
            longest_document=998, notes=[f"a note {EVIL}"], seconds=1.0,
            samples=[RenderedSample(pieces=[("What? ", False), (EVIL, True)], tokens=6, target_tokens=2)],
        ).write(self.folder.data / PreparedDataset.file_name)  # fmt: skip

    def plan(self) -> None:
        config = parse_config({"model": "m", "data": "d", "train": {"max_steps": 10}})
        cluster = parse_hardware("1xH100-80GB,ram=125GB")
        plan = make_plan(config, model_folder="Qwen2.5-7B", cluster=cluster, prepared=None)
        self.folder.write_plan(plan.model_copy(update={"model": f"/models/{EVIL.replace('/', '')}"}))

    def steps(self, first: int, last: int, **values: Any) -> None:
        for step in range(first, last + 1):
            told = {"loss": 3.0 / step, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens": 100, "target_tokens": 50}
            told |= {"seconds": 0.5, "tokens_per_second": 200.0, "memory_bytes": 2**30, **values}
            self.tell(EventKind.STEP, after=0.5, step=step, **told)

    def launch(self, step: int = 0) -> None:
        self.tell(EventKind.STAGE_STARTED, stage="train")
        self.tell(EventKind.LAUNCH, ranks=2)
        resumed = f"step-{step:08d}" if step else None
        self.tell(EventKind.TRAINING_STARTED, step=step, total_steps=10, world_size=2, resumed_from=resumed)

    def save(self, step: int) -> None:
        self.tell(EventKind.CHECKPOINT_SAVED, after=0.1, step=step, seconds=0.2, blocked_seconds=0.01, bytes=2**20)
        Checkpoint(
            step=step, world_size=2, zero_stage=2, precision="bf16", method="lora", fingerprint="f", train_state={},
            files={},
        ).write(layout.folder_of(self.folder.checkpoints, step) / layout.MANIFEST)  # fmt: skip

    def fail(self, *, action: str = "restart", why: str = "from the last good checkpoint") -> None:
        detail = f"ended by SIGKILL {EVIL} (whole story: {self.folder.path.resolve()}/logs/rank-00001.log)"
        self.tell(EventKind.FAULT, cause="killed", detail=detail, rank=1, step=6, phase="backward")
        self.tell(EventKind.RECOVERY, action=action, why=why, wait_seconds=0.0)

    def finish(self) -> None:
        self.tell(EventKind.BREAKDOWN, seconds_by_phase={"backward": 3.0, "forward": 1.0, "data": 0.0})
        quantities = {
            "gpu_memory_bytes": {"predicted": 2**30, "measured": 2**29},
            "step_seconds": {"predicted": 0, "measured": 0.5},
        }
        self.tell(EventKind.PREDICTED_AGAINST_MEASURED, quantities=quantities)
        self.tell(EventKind.STAGE_FINISHED, stage="train", seconds=9.0, summary="")

    def evaluate(self) -> None:
        difference = {"difference": 0.8, "difference_low": 0.7, "difference_high": 0.9}
        tasks = {"exact_match": {"base": 0.1, "tuned": 0.9, **difference}}
        EvaluationReport(
            data="held-out documents", documents=149, target_tokens=15_000, step=10, tasks=tasks,
            base=LossEstimate(loss=2.31, perplexity=10.07, interval=(2.2, 2.4)),
            tuned=LossEstimate(loss=1.204, perplexity=3.33, interval=(1.1, 1.3)),
            difference=-1.106, difference_interval=(-1.2, -1.0), notes=["few documents"],
            samples=[GenerationSample(prompt="2+2?", reference="4", base=f"turtles {EVIL}", tuned="four")],
        ).write(self.folder.evaluation)  # fmt: skip

    def export(self) -> None:
        for kind in ("adapter", "merged"):
            ExportedModel(
                kind=kind, step=10, parameters=7_000_000_000, dtype="bfloat16", max_logit_difference=3e-3,
                logit_tolerance=1e-2, chat_template_sha256=None,
                files={"model.safetensors": RankFile(sha256="ab" * 32, bytes=2**30)},
            ).write(self.folder.export / kind / ExportedModel.file_name)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "first run")


@pytest.fixture
def whole(run: Run) -> Run:
    """A LoRA run with one failure, complete."""
    run.prepare()
    run.plan()
    run.launch()
    run.steps(1, 4)
    run.save(4)
    run.steps(5, 6)
    run.fail()
    run.launch(4)
    run.steps(5, 10)
    run.tell(EventKind.EVALUATED, step=10, loss=1.3)
    run.save(10)
    run.finish()
    run.tell(EventKind.NOTE, message=f"beware {EVIL}")
    run.evaluate()
    run.export()
    return run


def test_a_whole_run_has_every_section_and_its_figures(whole: Run) -> None:
    page = page_of(whole.folder.path)
    assert page.sections == ["data", "plan", "training", "evaluation", "model", "next"]
    for part in (
        "✓ complete Trained for 10 steps, evaluated, exported and verified.", "1 × H100", "torch 2.13.0",
        "tales.jsonl", "2.310 → 1.204", "95 % interval -1.200 to -1.000", "tokens trained 1,000 in 10 steps of 10",
        "goodput", "1 failure", "7,473 rows", "7,461 documents", "149 of them held out", "12 rows", "3 duplicates",
        "88 tokens cut off", "98.1 %", "plan.zero_stage", "1.0 GiB 512 MiB 0.50", "backward 3 s 75.0 %",
        "steps done again", "killed 1 6 backward", "restart: from the last good checkpoint; went on after step 4",
        "2 written, 2 kept", "better", "exact match", "10.0 %", "+80.0 % (+70.0 to +90.0)", "turtles", "four",
        "few documents", "merged", "0.003", "0.01", "abababab", "foretune chat 'first run'",
    ):  # fmt: skip
        assert part in page.text, part
    assert "too short" not in page.text
    assert "seconds to the last step" not in page.text


def test_what_comes_from_outside_is_text(whole: Run) -> None:
    page = page_of(whole.folder.path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [name for _, values in page.tags for name in values if name.startswith("on")]
    assert not set("\x1b\u202e") & set(page.html)
    assert page.html.count(SHOWN) >= 5, "in a reason, a sample, an answer, a fault and a note"


def test_the_page_stands_alone(whole: Run) -> None:
    page = page_of(whole.folder.path)
    for tag, values in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "use", "image")
        assert "src" not in values
        assert (values.get("href") or "#").startswith("#")
    style = page.html.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page.html
    ids = [values["id"] for _, values in page.tags if values.get("id")]
    assert len(ids) == len(set(ids))
    links = {(values["href"] or "")[1:] for tag, values in page.tags if tag == "a"}
    assert links <= set(ids)


def test_the_page_can_be_read_by_everyone(whole: Run) -> None:
    page = page_of(whole.folder.path)
    assert ("html", {"lang": "en"}) in page.tags
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(values.get("scope") in ("col", "row") for tag, values in page.tags if tag == "th")
    pictures = [values for tag, values in page.tags if tag == "svg" and values.get("aria-hidden") != "true"]
    assert all(values.get("role") == "img" and values.get("aria-label") for values in pictures)
    assert "prefers-color-scheme: dark" in page.html
    assert "@media print" in page.html
    for svg in re.findall(r"<svg.*?</svg>", page.html, re.DOTALL):
        ET.fromstring(svg)


@pytest.mark.parametrize(("scheme", "pick"), [("light", 0), ("dark", 1)])
def test_colours_have_contrast(run: Run, scheme: str, pick: int) -> None:
    """WCAG 2.2, 1.4.3: at least 4.5 to 1 for text, on every background that it stands on."""
    blocks = re.findall(r":root \{(.*?)\}", page_of(run.folder.path).html, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", blocks[0] + blocks[pick]))

    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = [(front, back) for front in ("text", "soft", "accent", "good", "going", "bad") for back in ("page", "card")]
    pairs += [(tone, f"{tone}-back") for tone in ("good", "going", "bad")]
    pairs += [("text", f"{tone}-back") for tone in ("good", "going", "bad")] + [("text", "mark")]
    for front, back in pairs:
        low, high = sorted((luminance(colours[front]), luminance(colours[back])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, front, back)


def test_no_path_of_this_machine(whole: Run, tmp_path: Path) -> None:
    page = page_of(whole.folder.path)
    assert str(tmp_path) not in page.html
    assert "first run/logs/rank-00001.log" in page.text
    asked = page.text.partition("What was asked for")
    assert "/somewhere/private" not in asked[0], "only where the configuration is shown"
    assert "/somewhere/private/tales.jsonl" in asked[2]


def begun(run: Run) -> None:
    pass


def prepared(run: Run) -> None:
    run.prepare()


def planned(run: Run) -> None:
    run.prepare()
    run.plan()


def starting(run: Run) -> None:
    planned(run)
    run.tell(EventKind.STAGE_STARTED, stage="train")
    run.tell(EventKind.LAUNCH, ranks=2)


def died(run: Run) -> None:
    planned(run)
    run.launch()
    run.steps(1, 4)
    run.save(4)
    run.steps(5, 6)


def asked_to_stop(run: Run) -> None:
    died(run)
    run.tell(EventKind.STOP_REQUESTED, reason="SIGTERM")
    run.save(6)


def given_up(run: Run) -> None:
    died(run)
    run.fail(action="stop", why="3 restarts within an hour, which is the bound")


def mistaken(run: Run) -> None:
    planned(run)
    run.launch()
    outcome = Outcome.of_user_error(UserError("train.max_length", 9, "is too long", "give less"))
    outcome.write(run.folder.outcome_of(0))


def trained(run: Run) -> None:
    planned(run)
    run.launch()
    run.steps(1, 10)
    run.save(10)
    run.finish()


def broken_in_export(run: Run) -> None:
    trained(run)
    run.tell(EventKind.STAGE_STARTED, stage="export")


@pytest.mark.parametrize(
    ("state", "word", "sections"),
    [
        (begun, "▸ begun", ["next"]),
        (prepared, "▸ prepared", ["data", "next"]),
        (planned, "▸ planned", ["data", "plan", "next"]),
        (starting, "✗ broken off It ended at step 0 of 10 without a word", ["data", "plan", "next"]),
        (died, "✗ broken off It ended at step 6 of 10 without a word", ["data", "plan", "training", "next"]),
        (asked_to_stop, "▸ stopped as asked It was asked to stop (SIGTERM)", ["data", "plan", "training", "next"]),
        (given_up, "✗ stopped by a fault ended by SIGKILL", ["data", "plan", "training", "next"]),
        (mistaken, "✗ stopped by a mistake train.max_length: is too long", ["data", "plan", "training", "next"]),
        (trained, "✓ trained All 10 steps are done", ["data", "plan", "training", "next"]),
        (broken_in_export, "✗ broken off in export", ["data", "plan", "training", "next"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_run_at_any_stage_says_how_it_stands(
    run: Run, state: Callable[[Run], None], word: str, sections: list[str]
) -> None:
    state(run)
    page = page_of(run.folder.path)
    assert word in page.text
    assert page.sections == sections
    assert ("foretune export" if state in (trained, broken_in_export) else "foretune run 'first run/config.yaml'") in (
        page.text
    )


def test_what_is_saved_is_said(run: Run) -> None:
    given_up(run)
    said = page_of(run.folder.path).text
    assert "3 restarts within an hour, which is the bound. Everything up to step 4 is saved" in said


def test_a_run_that_is_at_work_says_how_long(run: Run) -> None:
    died(run)
    page = page_of(run.folder.path, in_use=True)
    assert "▸ running It is at work: train, step 6 of 10, about 2 s to go." in page.text


def test_the_time_line_is_time_of_training(run: Run) -> None:
    """A day between two commands is not on it, and the failures' cost is."""
    given_up(run)
    run.tell(EventKind.RUN_STARTED, after=86_400.0, versions={})
    run.launch(4)
    run.steps(5, 10)
    history = read_material(run.folder)
    end = history.history.launches[-1][-1]
    assert end == (pytest.approx(history.account.wall_seconds + 1.0), 10), (
        "and a second until the failure was decided on"
    )
    assert [len(launch) for launch in history.history.launches] == [7, 7]


def test_numbers_that_are_none_are_said_and_not_drawn(run: Run) -> None:
    planned(run)
    run.launch()
    run.steps(1, 3)
    run.steps(4, 4, loss="nan", grad_norm="inf")
    run.steps(5, 6)
    page = page_of(run.folder.path)
    assert page.html.count("step 4: nan, no number") == 1
    assert page.html.count("step 4: inf, no number") == 1
    assert not re.search(r'(points|x|y|cx|cy|d|width)="[^"]*(nan|inf)', page.html)


def test_a_damaged_artifact_is_named_and_the_rest_is_shown(whole: Run) -> None:
    whole.folder.plan.write_text('{"version": 1')
    page = page_of(whole.folder.path)
    assert page.sections == ["data", "training", "evaluation", "model", "next"]
    assert "An artifact could not be read. Plan: is damaged" in page.text


def test_a_damaged_journal_is_named_and_the_rest_is_shown(whole: Run) -> None:
    with whole.folder.events.open("a") as file:
        file.write(json.dumps({"time": 1.0, "kind": "step"}) + "\n")  # without its number
    page = page_of(whole.folder.path)
    assert "An artifact could not be read. events.jsonl: a line lacks something" in page.text
    assert "plan" in page.sections


def test_a_stop_without_its_fault_is_a_page_too(run: Run) -> None:
    with run.folder.events.open("a") as file:
        file.write(json.dumps({"time": 1.0, "kind": "recovery", "action": "stop", "why": "w"}) + "\n")
    assert page_of(run.folder.path).html


def test_a_neighbour_of_the_run_folder_keeps_its_name() -> None:
    shown = _Shown(Path("/x/run1"))
    assert shown.text("/x/run1/plan.json and /x/run10/plan.json") == "run1/plan.json and /x/run10/plan.json"


def test_long_runs_make_light_pages(run: Run) -> None:
    planned(run)
    run.launch()
    for number in range(120):
        first = number * 84 + 1
        run.steps(first, first + 83)
        run.save(first + 83)
        run.fail()
        run.launch(first + 83)
    html = page_of(run.folder.path).html
    assert len(html) < 400_000
    assert "The newest 25 of 120 failures" in html


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder, problem in ((tmp_path / "none", "there is no such folder"), (tmp_path, "is no run folder")):
        with pytest.raises(UserError, match=problem) as caught:
            write_report(folder)
        assert (caught.value.field, caught.value.value) == ("RUN", str(folder))
        assert "foretune prove" in caught.value.mend


def test_a_file_elsewhere(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere.html"
    assert write_report(run.folder.path, out=out) == out
    assert not run.folder.report.exists()
    with pytest.raises(UserError, match="is a folder"):
        write_report(run.folder.path, out=tmp_path)
    with pytest.raises(UserError, match="can't be written"):
        write_report(run.folder.path, out=Path("/proc/none/report.html"))


CELL = {
    "fault": "kill", "phase": "save", "stage": 2, "layout": "ZeRO-2", "expects": "equal", "steps_lost": 4,
    "seconds_lost": 1.25, "hash_equal": True, "difference": None, "passed": True, "problem": None,
    "name": "ZeRO-2: kill rank 0 in save",
}  # fmt: skip


def proof(**changes: Any) -> dict[str, Any]:
    cells = [
        CELL,
        {**CELL, "fault": "out_of_memory", "phase": "forward", "layout": "ZeRO-2 no dropout", "hash_equal": False,
         "expects": "within_tolerance", "difference": 2e-6, "name": "oom"},
        {**CELL, "layout": "ZeRO-3", "passed": False, "hash_equal": False, "seconds_lost": None, "problem": EVIL},
    ]  # fmt: skip
    head = {"date": "2026-01-01", "versions": {"torch": "2.13"}, "machine": "m", "model": "/x/tiny", "world_size": 2}
    return {**head, "cells": cells, "passed": False, "seconds": 9.0, **changes}


def test_a_proof_is_a_matrix(tmp_path: Path) -> None:
    (tmp_path / "prove.json").write_text(json.dumps(proof()))
    page = page_of(tmp_path)
    for part in ("✗ failed 2 of 3 cells recovered", "tiny, 2 ranks", "kill ✗ 1/2 4 1.2 s", "ZeRO-2 ZeRO-3",
                 "kill, save ✓ equal 4 steps, 1.2 s ✗ failed 4 steps", "out of memory, forward ✓ ≈ 4 steps",
                 "within tolerance: differs by 2e-06 of the update"):  # fmt: skip
        assert part in page.text, part
    assert SHOWN in page.html
    assert "no dropout" not in page.text


def test_random_kills_alone_are_a_page_too(tmp_path: Path) -> None:
    soak = {"kills": 282, "runs": 9, "wrong": 0, "goodput": 0.31, "seconds_lost": {"starting": 6.0, "saving": 0.0}}
    (tmp_path / "soak.json").write_text(json.dumps({**soak, "seconds": 608.0, "passed": True, "machine": "m"}))
    page = page_of(tmp_path)
    assert "✓ all recovered 282 kills at random moments in 9 trainings" in page.text
    assert "starting 6 s 100.0 %" in page.text


@pytest.mark.parametrize("name", ["prove.json", "soak.json"])
@pytest.mark.parametrize(
    "text", ["{", "[]", '{"cells": []}', '{"kills": 1, "runs": 1, "wrong": 0, "seconds_lost": {}}']
)
def test_a_damaged_proof_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"is damaged|has no"):
        write_report(tmp_path)
