"""The run folder: its name, its lock, and that two configurations never meet in one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.artifacts import RunFolder
from foretune.checkpoint import layout
from foretune.config import Config, load_config, parse_config
from foretune.errors import UserError
from foretune.pipeline.folder import default_out, in_use, opened, resolved, settle


def config(**keys: Any) -> Config:
    return parse_config({"model": "org/some-model", "data": "examples.jsonl", **keys})


def open_once(run: RunFolder, wanted: Config) -> bool:
    with opened(run, wanted) as same:
        return same


def with_checkpoint(run: RunFolder) -> None:
    layout.folder_of(run.checkpoints, 10).mkdir(parents=True)


def test_the_same_wishes_have_the_same_folder_and_others_another() -> None:
    name = default_out(config())
    assert name.parent == Path("runs")
    assert name.name.startswith("some-model-examples-")
    assert default_out(config()) == name
    assert default_out(config(checkpoint={"keep": 9})) == name
    assert default_out(config(trust_remote_code=True)) == name
    others = [{"method": "lora"}, {"train": {"seed": 1}}, {"plan": {"zero_stage": 3}},
              {"evaluate": {"validation": 0.1}}, {"data": "other/examples.jsonl"}, {"from_scratch": True}]  # fmt: skip
    names = {default_out(config(**other)) for other in others}
    assert len(names | {name}) == len(others) + 1


def test_the_folder_does_not_depend_on_where_the_command_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "examples.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    here = default_out(config(data="examples.jsonl"))
    monkeypatch.chdir(tmp_path / "inner")
    assert default_out(config(data="../examples.jsonl")) == here
    assert default_out(config(data=str(tmp_path / "examples.jsonl"))) == here


def test_local_paths_become_absolute_and_hub_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    sources = resolved(config(data=["a.jsonl", "*.jsonl", "org/data", "none/*.jsonl"])).data.sources
    paths = [source.path for source in sources]
    assert paths == [str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl"), "org/data", "none/*.jsonl"]


#: A name of more than 255 bytes is refused, which other tests see to.
NAMES = st.text(min_size=1).filter(lambda name: len(name.encode(errors="surrogatepass")) <= 255)


@given(NAMES, NAMES)
def test_any_names_make_a_plain_folder_name(model: str, data: str) -> None:
    model, data = model.lstrip("~") or "m", data.lstrip("~") or "d"
    name = default_out(parse_config({"model": model, "data": {"sources": [{"path": data}]}}))
    assert len(name.parts) == 2
    assert len(name.name.encode()) < 255
    assert not set(name.name) & set("/\\\0\n \"'$*?")


@pytest.mark.parametrize(
    ("name", "problem"), [("~nobody-of-that-name/x", "there is no such user"), ("x" * 300, "more than 255 bytes")]
)
def test_paths_that_cannot_be_are_refused_by_their_field(name: str, problem: str) -> None:
    for keys, field in (({"model": name}, "model"), ({"data": name}, "data.sources[0].path")):
        with pytest.raises(UserError) as caught:
            default_out(config(**keys))
        assert caught.value.field == field
        assert problem in caught.value.problem


def test_a_new_folder_is_private_and_says_what_was_asked(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "deep" / "run")
    assert open_once(run, config()) is False
    assert run.path.stat().st_mode & 0o777 == 0o700
    assert load_config(run.config) == config()
    assert open_once(run, config()) is True
    assert open_once(run, config(checkpoint={"keep": 9})) is True
    assert load_config(run.config).checkpoint.keep == 9
    before = run.config.stat().st_mtime_ns
    settle(run, config(checkpoint={"keep": 9}))
    assert run.config.stat().st_mtime_ns == before


def test_wishes_may_change_until_a_checkpoint_depends_on_them(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    open_once(run, config())
    assert open_once(run, config(train={"seed": 1})) is False
    with_checkpoint(run)
    assert open_once(run, config(train={"seed": 1}, plan={"zero_stage": 2})) is False  # the planner is asked again,
    assert load_config(run.config).plan.zero_stage == "auto"  # and until it agrees nothing is written
    with pytest.raises(UserError) as caught:
        open_once(run, config(train={"seed": 2}, data="b.jsonl"))
    assert caught.value.field == "--out"
    assert "train.seed was 1, is now 2" in caught.value.problem
    assert "data.sources[0].path was 'examples.jsonl', is now 'b.jsonl'" in caught.value.problem
    assert load_config(run.config).train.seed == 1


@pytest.mark.parametrize("prepare", ["file", "foreign"])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, prepare: str) -> None:
    out = tmp_path / "out"
    if prepare == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
        out.chmod(0o755)
    before = out.stat().st_mode
    with pytest.raises(UserError) as caught:
        open_once(RunFolder(out), config())
    assert caught.value.field == "--out"
    assert out.stat().st_mode == before
    assert out.read_text() == "mine" if prepare == "file" else [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_second_process_is_kept_out_and_let_in_when_the_first_was_killed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    script = f"""
import time
from pathlib import Path
from foretune.artifacts import RunFolder
from foretune.config import parse_config
from foretune.pipeline.folder import opened
with opened(RunFolder(Path({str(run.path)!r})), parse_config({{"model": "org/some-model", "data": "examples.jsonl"}})):
    print("open", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="in use") as caught:
            open_once(run, config())
        assert str(first.pid) in caught.value.problem
        first.kill()
    assert open_once(run, config()) is True


@pytest.mark.parametrize(
    ("error", "problem"),
    [(OSError(28, "No space left on device"), "no space"),
     (OSError("Detail: [errno 28] No space left on device"), "no space"),
     (PermissionError(13, "Permission denied", "{out}/data"), "can't be written (Permission denied)")],
)  # fmt: skip
def test_what_the_file_system_refuses_is_the_users_to_mend(tmp_path: Path, error: OSError, problem: str) -> None:
    run = RunFolder(tmp_path / "run")
    if error.filename:
        error.filename = error.filename.format(out=run.path)
    with pytest.raises(UserError) as caught, opened(run, config()):
        raise error
    assert caught.value.field == "--out"
    assert problem in caught.value.problem


def test_other_errors_of_the_file_system_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), opened(RunFolder(tmp_path / "run"), config()):
        raise PermissionError(13, "Permission denied", "/somewhere/else")


def test_a_run_is_in_use_while_it_is_held(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert not in_use(run.path)
    with opened(run, config()):
        assert in_use(run.path)
    assert not in_use(run.path)
