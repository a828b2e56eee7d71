"""State in shared memory is the state in a file, whoever wrote it and whoever reads it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foretune.checkpoint.snapshot import FolderWriter, MemoryWriter, load_random_state, random_state, seed_everything

WRITE = """
import sys, torch
from pathlib import Path
from foretune.checkpoint.snapshot import MemoryWriter
writer = MemoryWriter(Path(sys.argv[1]), expected_bytes=1 << 20)
for number in (1, 2):
    writer.begin()
    writer("engine/a.pt", {"weights": torch.full((1000,), float(number)), "step": number})
    writer("b.pt", [number])
print(writer.take())
import os; os._exit(1)  # a crash right after the snapshot
"""


@pytest.fixture
def memory():
    descriptor = os.memfd_create("test")
    yield descriptor
    os.close(descriptor)


def test_a_snapshot_outlives_the_process_that_made_it(memory: int, tmp_path: Path) -> None:
    path = f"/proc/{os.getpid()}/fd/{memory}"
    done = subprocess.run([sys.executable, "-c", WRITE, path], capture_output=True, text=True)
    blobs = eval(done.stdout)
    assert [name for name, _, _ in blobs] == ["engine/a.pt", "b.pt"]
    for name, offset, length in blobs:
        assert offset % 64 == 0
        file = tmp_path / Path(name).name
        file.write_bytes(os.pread(memory, length, offset))
    state = torch.load(tmp_path / "a.pt", mmap=True, weights_only=False)
    assert torch.equal(state["weights"], torch.full((1000,), 2.0)), "the second snapshot, in the same memory"
    assert torch.load(tmp_path / "b.pt", weights_only=False) == [2]


def test_memory_and_folder_hold_the_same(memory: int, tmp_path: Path) -> None:
    state = {"weights": torch.arange(10.0), "name": "x"}
    FolderWriter(tmp_path)("engine/a.pt", state)
    writer = MemoryWriter(Path(f"/proc/{os.getpid()}/fd/{memory}"), expected_bytes=1)
    writer.begin()
    writer("engine/a.pt", state)
    ((_, offset, length),) = writer.take()
    writer.close()
    (tmp_path / "from-memory.pt").write_bytes(os.pread(memory, length, offset))
    first, second = (torch.load(tmp_path / name, weights_only=False) for name in ("engine/a.pt", "from-memory.pt"))
    assert torch.equal(first["weights"], second["weights"])
    assert first["name"] == second["name"]


def test_random_states_go_on_where_they_were(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(3)
    draw()
    FolderWriter(tmp_path)("rank.pt", random_state())
    after = draw()
    seed_everything(4)
    load_random_state(tmp_path / "rank.pt")
    assert draw() == after
