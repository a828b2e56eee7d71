"""The face is lazy: planning, help and reports answer fast, in a process that never sees torch."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

import foretune
from foretune.artifacts import RunFolder

MODEL = Path(__file__).parents[1] / "models" / "stories260K"
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "peft", "pyarrow")

#: Runs a command line as the installed script does, then says on its last line which heavy packages came in.
SCRIPT = f"""
import json, sys
from foretune.__main__ import main
code = main(sys.argv[1:])
print()
print(json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def fresh(*words: str) -> tuple[int, list[str], str]:
    """Exit code, heavy packages and output of a command line in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=True, timeout=60
    )
    body, _, last = done.stdout.rstrip("\n").rpartition("\n")
    code, heavy = json.loads(last)
    return code, heavy, body


@pytest.mark.parametrize(
    "words",
    [
        ("-h",),
        ("run", "-h"),
        ("serve", "-h"),
        ("plan", "--model", str(MODEL)),
        ("plan", "--model", str(MODEL), "--hardware", "2x8xH100-80GB", "--why"),
        ("plan", "--model", str(MODEL), "--json"),
        ("run", "--model", str(MODEL), "--data", "no-such-file.jsonl"),
    ],
    ids=" ".join,
)
def test_light_commands_bring_in_no_torch(words: tuple[str, ...]) -> None:
    code, heavy, _ = fresh(*words)
    assert code == (2 if "no-such-file.jsonl" in words else 0)
    assert heavy == []


def test_a_report_brings_in_no_torch(tmp_path: Path) -> None:
    run, plan = RunFolder(tmp_path / "run"), foretune.plan(model=str(MODEL), hardware="2xA100-40GB")
    run.create()
    run.config.write_text(f"model: {MODEL}\ndata: d.jsonl\n")
    run.write_plan(plan)
    code, heavy, body = fresh("report", str(run.path), "--json")
    assert (code, heavy) == (0, [])
    assert json.loads(body) == {"report": str(run.report)}
    assert plan.strategy_name in run.report.read_text()
    code, heavy, body = fresh("report", str(tmp_path), "--json")
    assert (code, heavy) == (2, [])
    assert json.loads(body)["error"]["field"] == "RUN"


@pytest.mark.parametrize("words", [("-h",), ("plan", "--model", str(MODEL))], ids=["-h", "plan"])
def test_help_and_plan_answer_in_under_a_second(words: tuple[str, ...]) -> None:
    """By the clock; where other work keeps the cores busy through five tries, by the processor time that was needed."""
    seconds, processor_seconds = [], []
    for _ in range(5):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "foretune", *words], capture_output=True, check=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(time.perf_counter() - start)
        processor_seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if seconds[-1] < 1.0:
            return
    assert os.getloadavg()[0] > len(os.sched_getaffinity(0)), seconds
    assert min(processor_seconds) < 0.8


def test_importing_the_package_imports_next_to_nothing() -> None:
    code = "import sys, foretune; print([m for m in sys.modules if m.startswith(('foretune', 'pydantic', 'rich'))])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert answer.strip() == "['foretune']"


def test_the_face_offers_the_verbs() -> None:
    assert dir(foretune) == sorted(foretune.__all__)
    for name in foretune.__all__:
        assert callable(getattr(foretune, name))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        foretune.trian  # noqa: B018


def test_plan_from_python_is_the_plan_of_the_command_line() -> None:
    plan = foretune.plan(model=str(MODEL), hardware="2xA100-40GB", method="lora", train={"global_batch_size": 32})
    assert (plan.method, plan.world_size, plan.global_batch_size) == ("lora", 2, 32)
    code, _, body = fresh(
        "plan", "--model", str(MODEL), "--hardware", "2xA100-40GB", "--method", "lora",
        "--set", "train.global_batch_size=32", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(body) == plan.model_dump(mode="json")


def test_a_mistake_from_python_is_a_user_error() -> None:
    with pytest.raises(foretune.UserError) as caught:
        foretune.plan(model=str(MODEL), train={"learning_rat": 1e-5})
    assert caught.value.field == "train.learning_rat"
    assert "train.learning_rate" in caught.value.mend
