"""State in shared memory is the state in a file, whoever wrote it and whoever reads it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from foretune.checkpoint.files import WholeWrites
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


def test_a_window_is_made_beside_training(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages take seconds: only a save waits for them."""
    ready = threading.Event()
    make = MemoryWriter._make_pages
    monkeypatch.setattr(MemoryWriter, "_make_pages", lambda self: (ready.wait(30), make(self)))
    writer = MemoryWriter(Path(f"/proc/{os.getpid()}/fd/{memory}"), expected_bytes=1 << 16)
    writer.open_window(torch.device("cpu"))  # comes back at once
    assert writer._window is None
    ready.set()
    writer.begin()
    assert writer._window is not None
    writer.close()


class _Holder:
    """An object that carries a tensor, as DeepSpeed's states do."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("expected_bytes", [1 << 16, 2000])  # the window holds all of it, or a part
def test_a_window_gives_the_archive_that_torch_saves(memory: int, tmp_path: Path, expected_bytes: int) -> None:
    numbers = torch.arange(1000.0)
    state = {
        "shared": [numbers, numbers[3:], numbers.view(10, 100).T],
        "parameter": torch.nn.Parameter(torch.randn(5, 3)),
        "half": torch.randn(7).bfloat16(),
        "empty": torch.empty(0),
        "module": torch.nn.Linear(4, 2).state_dict(),
        "holder": _Holder(torch.ones(3, dtype=torch.int64)),
        "step": 3,
    }
    writer = MemoryWriter(Path(f"/proc/{os.getpid()}/fd/{memory}"), expected_bytes=expected_bytes)
    writer.open_window(torch.device("cpu"))
    for _ in range(2):  # the second time there is something in the holes already
        writer.begin()
        writer("a.pt", {"x": torch.randn(11)})
        writer("b.pt", state)
    blobs = writer.take()
    writer.close()
    for name, offset, length in blobs:
        (tmp_path / name).write_bytes(os.pread(memory, length, offset))
    plain = Path(tmp_path / "plain.pt")
    with WholeWrites(plain, "wb") as file:  # to a file object, and without sums, as the writer does
        torch.serialization.set_crc32_options(False)
        torch.save(state, file)
        torch.serialization.set_crc32_options(True)
    assert (tmp_path / "b.pt").read_bytes() == plain.read_bytes()
    assert torch.equal(torch.load(tmp_path / "b.pt", weights_only=False)["shared"][2], numbers.view(10, 100).T)


def test_what_the_kernel_takes_in_parts_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux writes at most 2 GiB at a time; here 1,000 bytes."""

    write = os.write
    monkeypatch.setattr(os, "write", lambda number, data: write(number, memoryview(data)[:1000]))
    weights = torch.randn(10_000)
    with WholeWrites(tmp_path / "a.pt", "wb") as file:
        torch.save({"weights": weights}, file)
    monkeypatch.undo()
    assert torch.equal(torch.load(tmp_path / "a.pt")["weights"], weights)


@pytest.mark.slow
@pytest.mark.parametrize("window", [False, True])
def test_a_tensor_of_more_than_two_gibibytes(memory: int, window: bool) -> None:
    path = Path(f"/proc/{os.getpid()}/fd/{memory}")
    writer = MemoryWriter(path, expected_bytes=1)
    if window:
        writer.open_window(torch.device("cpu"))
    writer.begin()
    weights = torch.arange(550_000_000, dtype=torch.int32)
    writer("a.pt", {"weights": weights, "after": torch.ones(3)})
    writer.close()
    state = torch.load(str(path), mmap=True)
    assert torch.equal(state["weights"], weights)
    assert state["after"].sum() == 3


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
