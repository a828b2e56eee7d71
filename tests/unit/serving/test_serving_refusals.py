"""What is refused before anything is started, each with its field and its mend; and how an engine is chosen."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foretune.artifacts import ExportedModel, RankFile
from foretune.errors import MachineFault, UserError
from foretune.serving import running_server, serve
from foretune.serving.engines import RunningEngine, choose_engine, engine_command
from foretune.serving.model import check_folder, default_name, read_model, template_sha256

TINY = Path(__file__).parents[2] / "models" / "stories260K"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(TINY, tmp_path / "tiny")


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    for key, value in changes.items():
        values.pop(key, None) if value is None else values.update({key: value})
    path.write_text(json.dumps(values))


def write_manifest(folder: Path, template: str | None, **sizes: int) -> None:
    files = {file.name: RankFile(sha256="", bytes=file.stat().st_size) for file in folder.iterdir()}
    files.pop(ExportedModel.file_name, None)
    files |= {name.replace("__", "."): RankFile(sha256="", bytes=size) for name, size in sizes.items()}
    ExportedModel(
        kind="full", step=1, parameters=1, dtype="fp32", max_logit_difference=0.0, logit_tolerance=0.0,
        chat_template_sha256=template, files=files,
    ).write(folder / ExportedModel.file_name)  # fmt: skip


def refused(do: Callable[[], Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        do()
    assert caught.value.mend
    return caught.value


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.invalid"])
def test_an_open_address_demands_a_key(model: Path, host: str) -> None:
    assert refused(lambda: serve(model, host=host, port=0)).field == "--api-key"


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "tab\t", "new\nline"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_repeated(model: Path, key: str) -> None:
    error = refused(lambda: serve(model, api_key=key, port=0))
    assert error.field == "--api-key"
    assert not key or key not in str(error)


def test_a_taken_port_is_said_before_anything_is_loaded(model: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        error = refused(lambda: serve(model, port=port))
    assert (error.field, error.value) == ("--port", port)
    assert "already in use" in error.problem


@pytest.mark.parametrize("port", [70_000, 65_536, -1])
def test_a_port_that_is_none(model: Path, port: int) -> None:
    assert refused(lambda: serve(model, port=port)).field == "--port"


def test_a_host_that_is_not_ours(model: Path) -> None:
    assert refused(lambda: serve(model, host="192.0.2.7", api_key="key", port=0)).field == "--host"


def test_missing_packages_are_named_with_the_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    error = refused(lambda: serve(model, port=0))
    assert error.value == "fastapi"
    assert 'pip install "foretune[serve]"' in error.mend


@pytest.mark.parametrize(("option", "value"), [("engine", "llama"), ("served_name", " "), ("max_request_bytes", 0)])
def test_bad_options(model: Path, option: str, value: Any) -> None:
    options: dict[str, Any] = {option: value}
    assert refused(lambda: serve(model, port=0, **options)).field == "--" + option.replace("_", "-")


def test_folders_that_hold_no_model(tmp_path: Path, model: Path) -> None:
    assert "no such folder" in refused(lambda: check_folder(tmp_path / "gone")).problem
    assert "no config.json" in refused(lambda: check_folder(tmp_path)).problem
    (tmp_path / "adapter_config.json").write_text("{}")
    error = refused(lambda: check_folder(tmp_path))
    assert "adapter" in error.problem
    assert "merged" in error.mend
    for damaged in ("{", "[]", "{}", '{"architectures": []}'):
        (model / "config.json").write_text(damaged)
        assert refused(lambda: check_folder(model)).field == "model"


def test_an_export_whose_files_changed_is_refused(model: Path) -> None:
    write_manifest(model, None)
    assert check_folder(model) is not None
    write_manifest(model, None, model__safetensors=12)
    assert "not 12" in refused(lambda: check_folder(model)).problem
    write_manifest(model, None, gone__json=1)
    assert "gone.json is missing" in refused(lambda: check_folder(model)).problem


def test_the_chat_template_must_be_the_exported_one(model: Path) -> None:
    edit(model / "tokenizer_config.json", chat_template=TEMPLATE)
    digest = template_sha256(read_model(model).tokenizer)
    assert digest is not None
    write_manifest(model, digest)
    assert read_model(model).has_chat_template
    write_manifest(model, "0" * 64)
    assert "not the one it was trained with" in refused(lambda: read_model(model)).problem
    write_manifest(model, None)
    assert "without one" in refused(lambda: read_model(model)).problem
    edit(model / "tokenizer_config.json", chat_template=None)
    write_manifest(model, digest)
    assert "gone" in refused(lambda: read_model(model)).problem


def test_what_is_read_of_a_model(model: Path) -> None:
    served = read_model(model, name="public")
    assert served.name == "public"
    assert (served.context_length, served.vocab_size) == (512, 512)
    assert served.generation["eos_token_id"] == 2
    assert served.count_text_tokens("Once upon a time") == 5  # with the <s> that the tokenizer puts first
    assert not served.has_chat_template
    assert any("no chat template" in note for note in served.notes)
    (model / "generation_config.json").unlink()
    assert read_model(model).generation["eos_token_id"] == 2, "config.json says it too"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert any("no stop token" in note for note in read_model(model).notes)


def test_an_unreadable_tokenizer_is_the_folders_fault(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    assert refused(lambda: read_model(model)).field == "model"


@pytest.mark.parametrize(
    ("path", "name"), [("runs/first/export", "first"), ("runs/first/export/merged", "first"), ("models/gpt2", "gpt2")]
)
def test_the_name_of_a_model_says_something(tmp_path: Path, path: str, name: str) -> None:
    assert default_name(tmp_path / path) == name


def test_without_vllm_transformers_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_engine("auto") == "transformers"
    assert choose_engine("transformers") == "transformers"
    assert refused(lambda: choose_engine("vllm")).field == "--engine"


def test_vllm_is_taken_where_it_is_installed_and_a_gpu_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_engine("auto") == "vllm"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_engine("auto") == "transformers"
    assert refused(lambda: choose_engine("vllm")).field == "--engine"
    command = engine_command("vllm", Path("/tmp/e.sock"))
    assert command[command.index("--uds") + 1] == "/tmp/e.sock"


def test_an_engine_that_can_not_load_its_model_is_a_fault_with_its_log(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"no weights")
    before = set(threading.enumerate())
    with pytest.raises(MachineFault) as caught, running_server(model):
        pass
    assert "exit status 1" in str(caught.value)
    assert "  | " in str(caught.value)
    assert "safetensors" in str(caught.value).lower() or "header" in str(caught.value).lower()
    assert set(threading.enumerate()) <= before


def test_stopping_an_engine_twice_and_while_it_loads(model: Path) -> None:
    engine = RunningEngine.start("transformers", model)
    root = Path(engine.folder.name)
    assert root.stat().st_mode & 0o777 == 0o700
    engine.stop()
    engine.stop()
    assert engine.keeper.returncode == 0
    assert not root.exists()
