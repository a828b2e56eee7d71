"""Where models come from: folders, .gguf files, the hub; and what is said when they can't be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foretune.errors import UserError
from foretune.model import source
from foretune.model.gguf import ConvertedModel
from foretune.model.source import file_sha256, has_weights, hub_answers, resolve_model

STORIES = Path(__file__).parents[2] / "models" / "stories260K"


def fault(name: str | Path, tmp_path: Path, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        resolve_model(str(name), run_model_folder=tmp_path / "run" / "model", cache=tmp_path / "cache", **options)
    assert caught.value.field == "model"
    assert caught.value.value == str(name)
    assert caught.value.mend
    return caught.value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "models" / "small-model"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"\x08" + bytes(20))
    return made


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(STORIES), run_model_folder=tmp_path / "model") == STORIES
    assert not (tmp_path / "model").exists()


def test_a_relative_folder_becomes_absolute(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert resolve_model("small-model", run_model_folder=tmp_path / "model") == folder


def test_pickled_weights_are_taken_and_absent_ones_are_not(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert resolve_model(str(folder), run_model_folder=tmp_path / "model") == folder
    (folder / "pytorch_model.bin").unlink()
    assert "--from-scratch" in fault(folder, tmp_path).mend
    assert resolve_model(str(folder), run_model_folder=tmp_path / "model", weights=False) == folder


def test_every_shard_must_be_there(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not has_weights(folder)
    assert "model-00002-of-00002.safetensors" in fault(folder, tmp_path).problem
    (folder / "model-00002-of-00002.safetensors").write_bytes(bytes(9))
    assert resolve_model(str(folder), run_model_folder=tmp_path / "model") == folder
    (folder / "model.safetensors.index.json").write_text("{")
    assert "damaged" in fault(folder, tmp_path).problem


def test_a_git_lfs_pointer_is_no_weights(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in fault(folder, tmp_path).mend


def test_what_is_given_in_place_of_a_model_is_named(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "some-run"
    run.mkdir()
    (run / "config.yaml").write_text("model: x\n")
    assert str(run / "export") in fault(run, tmp_path).mend
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "is an adapter" in fault(adapter, tmp_path).problem
    ggufs = tmp_path / "ggufs"
    ggufs.mkdir()
    (ggufs / "a.Q4_K.gguf").touch()
    assert str(ggufs / "a.Q4_K.gguf") in fault(ggufs, tmp_path).mend
    assert str(folder) in fault(folder.parent, tmp_path).mend  # one level too high
    assert str(folder) in fault(folder / "model.safetensors", tmp_path).mend  # one level too low
    loose = tmp_path / "loose.bin"
    loose.touch()
    assert "no .gguf file" in fault(loose, tmp_path).problem
    assert "hub id" in fault(tmp_path / "cache_nothing", tmp_path).mend


def test_a_misspelt_path_is_answered_with_near_ones(folder: Path, tmp_path: Path) -> None:
    assert str(folder) in fault(folder.parent / "smal-modle", tmp_path).mend
    (folder.parent / "tiny.Q8_0.gguf").touch()
    assert "tiny.Q8_0.gguf" in fault(folder.parent / "tiny.Q80.gguf", tmp_path).mend


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere-at-all", "a/b/c", "weird name!", "x.gguf"])
def test_what_can_be_no_hub_id_is_not_asked_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any, **__: Any) -> Path:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(source, "_from_hub", asked)
    assert "no such folder" in fault(name, tmp_path).problem


# ── .gguf ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion (tested on its own) by one that notes what it was asked to make."""
    made: list[Path] = []

    def convert(file: Path, folder: Path, *, sha256: str = "") -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(file.read_bytes())
        ConvertedModel(source=file.name, sha256=sha256, architecture="llama", parameters=1, dtype="float32").write(
            folder / ConvertedModel.file_name
        )
        made.append(folder)

    monkeypatch.setattr(source, "convert_gguf", convert)
    return made


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[[Path, str], Path]:
    def call(file: Path, run: str) -> Path:
        return resolve_model(str(file), run_model_folder=tmp_path / run / "model", cache=tmp_path / "cache")

    return call


def test_a_file_is_converted_once_for_all_runs(
    tmp_path: Path, conversions: list[Path], resolve: Callable[[Path, str], Path]
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"one")
    first, again, other = resolve(file, "a"), resolve(file, "a"), resolve(file, "b")
    assert (first, again, other) == (tmp_path / "a/model", tmp_path / "a/model", tmp_path / "b/model")
    assert conversions == [tmp_path / "cache" / file_sha256(file)]
    assert os.path.samefile(first / "model.safetensors", other / "model.safetensors")  # linked, not copied
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["model"]


def test_a_changed_file_is_converted_anew(
    tmp_path: Path, conversions: list[Path], resolve: Callable[[Path, str], Path]
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"one")
    resolve(file, "a")
    file.write_bytes(b"two")
    assert (resolve(file, "a") / "model.safetensors").read_bytes() == b"two"
    assert len(conversions) == 2


def test_an_incomplete_conversion_is_made_again(
    tmp_path: Path, conversions: list[Path], resolve: Callable[[Path, str], Path]
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"one")
    stale = tmp_path / "cache" / file_sha256(file)
    stale.mkdir(parents=True)
    (stale / "config.json").write_text("{}")
    model = resolve(file, "a")
    assert (model / "model.safetensors").read_bytes() == b"one"
    (model / "model.safetensors").unlink()
    assert (resolve(file, "a") / "model.safetensors").read_bytes() == b"one"
    assert len(conversions) == 1  # the second time the cache had it


def test_without_a_cache_the_run_keeps_its_own(tmp_path: Path, conversions: list[Path]) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"one")
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    model = resolve_model(str(file), run_model_folder=tmp_path / "run/model", cache=blocked / "models")
    assert conversions == [model] == [tmp_path / "run/model"]


# ── hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def hub_cache(home: Path, files: dict[str, str]) -> None:
    """A hub cache as huggingface_hub lays it out, with one model ``org/cached``."""
    repository = home / "models--org--cached"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for name, text in files.items():
        (snapshot / name).write_text(text)


def resolve_in_a_fresh_process(name: str, cache: Path, *, near: Path) -> tuple[float, str]:
    """The hub's settings are read once a process, so each case needs its own. Returns seconds and what was said."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom foretune.errors import UserError\n"
        "from foretune.model.source import resolve_model\n"
        "try:\n    print('found', resolve_model(sys.argv[1], run_model_folder=Path('model')))\n"
        "except UserError as error:\n    print('refused', error)\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    root = Path(source.__file__).parents[2]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "PYTHONPATH": str(root)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, name], cwd=near, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("[]"), "resolving a model must not import torch"
    return time.monotonic() - started, done.stdout


def test_offline_the_hubs_cache_is_used(tmp_path: Path) -> None:
    hub_cache(tmp_path / "hub", {"config.json": "{}", "model.safetensors": "x"})
    _, said = resolve_in_a_fresh_process("org/cached", tmp_path / "hub", near=tmp_path)
    assert said.startswith("found")
    assert "models--org--cached/snapshots" in said


def test_offline_an_incomplete_copy_is_refused(tmp_path: Path) -> None:
    hub_cache(tmp_path / "hub", {"config.json": "{}"})
    _, said = resolve_in_a_fresh_process("org/cached", tmp_path / "hub", near=tmp_path)
    assert said.startswith("refused")


def test_offline_an_unknown_model_is_refused_with_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "gpt2-small").mkdir()
    _, said = resolve_in_a_fresh_process("gpt2-smal", tmp_path / "hub", near=tmp_path)
    assert said.startswith("refused")
    assert "gpt2-small" in said
    _, said = resolve_in_a_fresh_process("org/unknown", tmp_path / "hub", near=tmp_path)
    assert "HF_HUB_OFFLINE" in said


def test_a_hub_that_never_answers_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_ask_hub", lambda *_: time.sleep(3) is None)
    started = time.monotonic()
    assert not hub_answers("org/name", timeout_seconds=0.2)
    assert time.monotonic() - started < 2
    monkeypatch.setattr(source, "_ask_hub", lambda *_: True)
    assert hub_answers("org/name", timeout_seconds=5)


@pytest.mark.parametrize(
    ("kind", "word"),
    [("GatedRepoError", "consent"), ("RepositoryNotFoundError", "neither"), ("HfHubHTTPError", "HTTP 503")],
)
def test_the_hubs_refusals_are_the_users_to_mend(
    kind: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    class Response:
        status_code = 503
        headers: dict[str, str] = {}  # noqa: RUF012
        request = None

    def refuse(*_: Any, **__: Any) -> str:
        error_type = getattr(errors, kind)
        error: Exception = error_type.__new__(error_type)
        Exception.__init__(error, "no")
        error.response = Response()  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(source, "hub_answers", lambda *_, **__: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert word in fault("org/name", tmp_path).problem


def test_pickles_and_code_are_fetched_only_when_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        (tmp_path / "config.json").write_text("{}")
        if "pytorch_model*.bin" in allow_patterns:
            (tmp_path / "pytorch_model.bin").write_bytes(b"x")
        return str(tmp_path)

    monkeypatch.setattr(source, "hub_answers", lambda *_, **__: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("org/name", run_model_folder=tmp_path / "m") == tmp_path
    assert ["*.safetensors" in patterns for patterns in asked] == [True, False]
    assert not any("*.py" in patterns for patterns in asked)
    resolve_model("org/name", run_model_folder=tmp_path / "m", trust_remote_code=True)
    assert "*.py" in asked[-1]
    (tmp_path / "pytorch_model.bin").unlink()
    asked.clear()
    resolve_model("org/name", run_model_folder=tmp_path / "m", weights=False)
    assert len(asked) == 1
    assert not {"*.safetensors", "pytorch_model*.bin"} & set(asked[0])
