"""Real checkpoints for every test that reads one: written once per session by ranks on the real engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import pytest

WRITER = Path(__file__).parent / "checkpoint" / "write_engine_checkpoints.py"


class WriteCheckpoints(Protocol):
    def __call__(self, out: Path, *, cases: str, world_size: int) -> Path: ...


def _write(out: Path, *, cases: str, world_size: int) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    arguments = [str(WRITER), "--out", str(out), "--cases", cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command + arguments, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="session")
def write_checkpoints() -> WriteCheckpoints:
    """A function that starts `world_size` ranks which write the named cases (comma-separated, or ``all``) below `out`."""
    return _write


@pytest.fixture(scope="session")
def engine_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one subfolder per case of the script, written by two ranks (30 s on two cores)."""
    return _write(tmp_path_factory.mktemp("engine"), cases="all", world_size=2)
