"""The doctor: complete, fast, and well-mannered when things are missing or broken."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from foretune import doctor
from foretune.__main__ import main
from foretune.doctor import Finding, examine

GIB = 2**30


def named(findings: list[Finding], name: str) -> Finding:
    found = [finding for finding in findings if finding.name == name]
    assert len(found) == 1, [finding.name for finding in findings]
    return found[0]


def test_examines_everything_in_under_ten_seconds() -> None:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "foretune", "doctor", "--json"], capture_output=True, text=True, timeout=60
    )
    assert time.perf_counter() - start < 10
    assert done.returncode == 0, done.stderr
    names = {finding["name"] for finding in json.loads(done.stdout)}
    looked_at = {
        "python",
        "torch",
        "deepspeed",
        "transformers",
        "cores",
        "bf16 on the CPU",
        "memory",
        "disk",
        "/dev/shm",
    }
    assert looked_at | {"g++", "ninja", "nvcc", "hub", "extra serve", "extra gguf"} <= names


def test_whatever_will_fail_or_hurt_has_a_mend_or_is_a_fact() -> None:
    for finding in examine():
        assert finding.level in ("good", "note", "bad")
        assert finding.name
        assert finding.value
        if finding.level == "bad":
            assert finding.mend


def test_as_a_table_it_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "deepspeed" in capsys.readouterr().out


def test_missing_packages_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[str], str | None] = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("deepspeed", "gguf") else real(name))
    findings = examine()
    assert named(findings, "deepspeed").level == "bad"
    extra = named(findings, "extra gguf")
    assert (extra.level, extra.mend) == ("note", "pip install 'foretune[gguf]'")
    assert "gguf" in extra.meaning


def test_a_torch_that_breaks_on_import_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch → ImportError
    broken = [finding for finding in examine() if finding.value == "can't be imported"]
    assert [finding.level for finding in broken] == ["bad"]


def test_gpus_that_torch_cannot_use_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    listing = "NVIDIA A100-SXM4-40GB, 40960, 512, 550.54\nNVIDIA L4, 23034, 0, 550.54\n"
    monkeypatch.setattr(doctor, "_output", lambda command: listing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    findings = examine()
    assert named(findings, "GPU 0").value == "NVIDIA A100-SXM4-40GB"
    assert named(findings, "GPUs").value == "of different kinds"
    assert named(findings, "GPUs in torch").level == "bad"


def test_containers_limits_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/sys/fs/cgroup/memory.max": f"{2 * GIB}\n", "/sys/fs/cgroup/cpu.max": "50000 100000\n"}
    monkeypatch.setattr(doctor, "_read", lambda path: files.get(path, ""))
    findings = examine()
    memory = named(findings, "memory")
    assert memory.value.endswith("of 2.0")
    assert memory.level == "note"
    assert "limited to 0.5" in named(findings, "cores").value
    assert named(findings, "bf16 on the CPU").value == "emulated"


def test_small_shared_memory_and_a_full_disk_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(total=64 * 2**20, free=1 * GIB))
    findings = examine()
    assert (named(findings, "/dev/shm").value, named(findings, "/dev/shm").level) == ("64 MiB", "note")
    assert "--shm-size" in named(findings, "/dev/shm").mend
    assert named(findings, "disk").level == "note"


def test_the_hub_is_looked_for_where_it_is_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert named(list(doctor._hub()), "hub").value == "reachable"
    assert named(list(doctor._hub()), "hub").value == "not reachable"  # nobody listens there any more
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in named(list(doctor._hub()), "hub").value


def test_commands_that_hang_or_fail_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_COMMAND_TIMEOUT_SECONDS", 0.2)
    commands: list[Any] = [["sleep", "5"], ["false"], ["no-such-command"]]
    assert [doctor._output(command) for command in commands] == ["", "", ""]
    assert doctor._output(["echo", "x"]) == "x\n"
