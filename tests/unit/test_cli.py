"""The command line: parsing to a configuration, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from foretune import pipeline
from foretune.__main__ import main
from foretune.artifacts import PreparedDataset, RunFolder
from foretune.cli import app
from foretune.config import Config, parse_config
from foretune.errors import (
    ExitCode,
    ForetuneError,
    NoPlanFits,
    Preempted,
    TrainingStopped,
    UserError,
    VerificationFailed,
)

MODEL = Path(__file__).parents[1] / "models" / "stories260K"
VERBS = [command.callback.__name__ for command in app.registered_commands if command.callback]


@pytest.fixture(autouse=True)
def _own_log_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` gives the package's logger a handler on this test's stderr, which is closed when the test ends."""
    logger = logging.getLogger("foretune")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    monkeypatch.setattr(logger, "level", logger.level)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, dict[str, object]]]:
    """Calls of the road, recorded instead of gone."""
    calls: list[tuple[Config, dict[str, object]]] = []

    def travel(config: Config, **options: object) -> None:
        calls.append((config, options))
        raise UserError("test", None, "stops here", "none")

    monkeypatch.setattr(pipeline, "travel", travel)
    return calls


def raise_from_the_road(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def travel(config: Config, **options: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "travel", travel)
    return main(["run", "--model", "m", "--data", "d.jsonl", "--json"])


@pytest.mark.parametrize("verb", VERBS)
def test_each_help_has_one_example_that_parses(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "-h"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    examples = re.findall(rf"Example: (foretune {verb}(?: [\w./=-]+)*)", text)
    assert len(examples) == 1
    options = [word for word in examples[0].split() if word.startswith("--")]
    assert all(f" {option} " in text.partition("Options")[2] for option in options)


def test_no_words_at_all_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f" {verb} " in out for verb in VERBS)


def test_options_settings_and_file_become_one_configuration(
    tmp_path: Path, asked: list[tuple[Config, dict[str, object]]]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        yaml.safe_dump({"model": "a", "data": "a.jsonl", "method": "lora", "train": {"epochs": 3.0, "seed": 4}})
    )
    words = ["run", str(file), "--model", "b", "--epochs", "2", "--set", "train.seed=5", "--set", "plan.zero_stage=3"]
    more = ["--data", "x.jsonl", "--data", "y.jsonl", "--deterministic", "--nproc", "2", "--out", str(tmp_path / "r")]
    code = main([*words, *more])
    assert code == 2
    config, options = asked[0]
    assert config == parse_config({
        "model": "b", "data": ["x.jsonl", "y.jsonl"], "method": "lora", "plan": {"zero_stage": 3},
        "train": {"epochs": 2.0, "seed": 5, "deterministic": True},
    })  # fmt: skip
    assert options["nproc"] == 2
    assert options["out"] == tmp_path / "r"
    assert options["until"] == "export"


@pytest.mark.parametrize(("verb", "until"), [("run", "export"), ("train", "train"), ("prepare", "prepare")])
def test_verbs_end_the_road_where_they_say(
    verb: str, until: str, asked: list[tuple[Config, dict[str, object]]]
) -> None:
    main([verb, "--model", "m", "--data", "d.jsonl"])
    assert asked[0][1]["until"] == until


@pytest.mark.parametrize(
    ("error", "code", "field"),
    [
        (UserError("train.epochs", -1, "is negative", "give more"), 2, "train.epochs"),
        (NoPlanFits(["ZeRO-0: 90 GiB of 80"], "two GPUs"), 3, "plan"),
        (TrainingStopped("rank 1 died", rank=1, step=7, last_checkpoint="x"), 4, None),
        (VerificationFailed("logits differ"), 1, None),
        (Preempted(12), 75, None),
        (KeyboardInterrupt(), 75, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_exit_codes(
    error: BaseException,
    code: int,
    field: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert raise_from_the_road(monkeypatch, error) == code
    captured = capsys.readouterr()
    told = json.loads(captured.out)["error"]
    assert told["exit_code"] == code
    assert told.get("field") == field
    assert "Traceback" not in captured.err
    if code == 75:
        assert "foretune run --model m --data d.jsonl --json" in captured.err
    if isinstance(error, ForetuneError):
        assert str(error).splitlines()[0] in captured.err


def test_our_bug_is_a_traceback_and_where_to_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raise_from_the_road(monkeypatch, ZeroDivisionError("oops")) == ExitCode.OUR_BUG
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert "Please report it" in captured.err
    assert json.loads(captured.out)["error"] == {"problem": "ZeroDivisionError: oops", "exit_code": 1}


def test_all_faults_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--json", "--set", "train.epochs=-1", "--set", "modle=x"]) == 2
    captured = capsys.readouterr()
    told = json.loads(captured.out)["error"]
    assert {fault["field"] for fault in told["faults"]} == {"model", "data", "train.epochs", "modle"}
    assert captured.err.count("mend:") == 4


def test_a_value_never_fills_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", "m", "--data", "d.jsonl", "--method", "x" * 5000]) == 2
    told = capsys.readouterr().err
    assert "xxx...xxx" in told
    assert len(told) < 600


def test_values_from_outside_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", "m", "--data", "\x1b]0;owned\x07.jsonl", "--method", "\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_plan_goes_to_stdout_and_deepspeed_json_to_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ds.json"
    words = ["plan", "--model", str(MODEL), "--hardware", "2xA100-40GB", "--set", "plan.zero_stage=2"]
    assert main([*words, "--deepspeed-config", str(file)]) == 0
    captured = capsys.readouterr()
    assert "plan.zero_stage" in captured.out
    assert captured.err == ""
    assert json.loads(file.read_text())["zero_optimization"]["stage"] == 2
    assert main([*words, "--deepspeed-config", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text())


def test_a_streamed_plan_writes_the_best_file_that_deepspeed_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ds.json"
    words = ["plan", "--model", "Qwen2.5-7B", "--hardware", "1xH100,ram=125GB,cores=16"]
    assert main([*words, "--deepspeed-config", str(file)]) == 0
    captured = capsys.readouterr()
    assert "of the optimizer streamed from host memory" not in captured.err
    assert "does not stream the optimizer; its file is for ZeRO-3 + " in captured.err
    assert json.loads(file.read_text())["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_planning_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--model", str(MODEL), "--data", "x.jsonl", "--json"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_plan_estimates_the_tokens_of_data_that_is_not_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(*words: str) -> int:
        assert main(["plan", "--model", str(MODEL), "--set", "train.global_batch_size=4", "--json", *words]) == 0
        return int(json.loads(capsys.readouterr().out)["total_steps"])

    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text("word " * 20_000)
    large.write_text("word " * 200_000)
    assert 9 <= steps("--data", str(large)) / steps("--data", str(small)) <= 11
    assert steps("--tokens", "1000000") == pytest.approx(1_000_000 / 512 / 4, rel=0.01)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m foretune plan --model {MODEL} --why --json | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["{", "0"]
    assert done.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_a_stage_ends_with_75_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    data, out = tmp_path / "d.jsonl", tmp_path / "run"
    data.write_text("\n".join(json.dumps({"text": f"sentence number {index} of a text"}) for index in range(20_000)))
    command = [
        sys.executable,
        "-m",
        "foretune",
        "prepare",
        "--model",
        str(MODEL),
        "--data",
        str(data),
        "--out",
        str(out),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not RunFolder(out).events.is_file() or "stage_started" not in RunFolder(out).events.read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "run the same command again: foretune prepare" in err
    assert "Traceback" not in err
    assert not (out / "data" / PreparedDataset.file_name).exists()
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert PreparedDataset.read(out / "data" / PreparedDataset.file_name).rows_read == 20_000


def test_an_interruption_inside_exec_does_not_take_the_exit_code(tmp_path: Path) -> None:
    """`python -m` would end itself with SIGINT, whatever the code, though the interruption was caught."""
    (tmp_path / "interrupted.py").write_text(
        "import sys\n"
        "import foretune.__main__ as face\n"
        "face._say('what is imported late runs exec too, and would forget it by chance')\n"
        "face.execute = lambda words: exec('raise KeyboardInterrupt')\n"
        "sys.exit(face.main(['prepare']))\n"
    )
    done = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 75, done.stderr


def test_an_interruption_that_python_drops_comes_again(tmp_path: Path) -> None:
    """Raised in a ``__del__`` or in the callback of a weak reference it is "ignored": the command would go on."""
    (tmp_path / "dropped.py").write_text(
        "import os, signal, sys, time\n"
        "import foretune.__main__ as face\n"
        "class Late:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        for _ in range(1000): pass\n"
        "def execute(words):\n"
        "    Late()\n"
        "    time.sleep(20)\n"
        "face.execute = execute\n"
        "sys.exit(face.main(['prepare']))\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "dropped.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    assert time.monotonic() - start < 15
    assert "Traceback" not in done.stderr
