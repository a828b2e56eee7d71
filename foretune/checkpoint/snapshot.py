"""Taking the state of a rank out of its process, so that training can go on while it is written to disk.

    engine.save(write) ──▶ `MemoryWriter` ──torch.save──▶ anonymous shared memory of the supervisor ──▶ disk, later
                      │                   └─ from a GPU: through a page-locked window, see `foretune.checkpoint.window`
                      └──▶ `FolderWriter` ──torch.save──▶ disk, now (where host memory has no room for a copy)

The memory is a memfd that the supervisor made: it outlives the rank that wrote it, so that a snapshot survives a crash
of all ranks, and it is gone with the last process that has it open, so that nothing is ever left behind. (Files in
/dev/shm would be, and containers often allow 64 MB there.)
"""

from __future__ import annotations

import os
import random
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from foretune.checkpoint.files import WholeWrites
from foretune.checkpoint.window import HostWindow

#: What torch aligns tensors to within an archive; keeping archives so aligned keeps them mappable.
_ALIGNMENT = 64


class StateWriter(Protocol):
    """Takes the picklable state that is to become the file `name` of a checkpoint."""

    def __call__(self, name: str, state: Any) -> None: ...


class FolderWriter:
    """Writes each state below a folder at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str, state: Any) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)


class MemoryWriter:
    """Writes each state into shared memory, one after the other.

    Args:
        path: of the memory, for example ``/proc/PID/fd/NUMBER``.
        expected_bytes: of one snapshot. Its pages are made in the background: touching new memory for the first time
            is 15 times slower than copying into it (0.4 against 6-8 GB/s measured).
    """

    def __init__(self, path: Path, *, expected_bytes: int) -> None:
        self._file = WholeWrites(os.open(path, os.O_RDWR), "r+")
        self._expected_bytes = max(1, expected_bytes)
        self._blobs: list[tuple[str, int, int]] = []
        self._end = 0
        self._window: HostWindow | None = None
        self._background = threading.Thread(target=self._make_pages, daemon=True)
        self._background.start()

    def open_window(self, device: torch.device) -> None:
        """Let tensors on `device` come by the fastest way; made in the background."""
        self._background = threading.Thread(target=self._make_window, args=(device, self._background), daemon=True)
        self._background.start()

    def begin(self) -> None:
        """Forget the last snapshot; the memory is used again."""
        self._background.join()
        self._blobs, self._end = [], 0

    def __call__(self, name: str, state: Any) -> None:
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(start)
        # The supervisor takes a sha256 of every byte; torch's CRC of each tensor would only slow the copy down.
        torch.serialization.set_crc32_options(False)
        try:
            if self._window is not None:
                self._window.save(state, self._file)
            else:
                torch.save(state, self._file)
        finally:
            torch.serialization.set_crc32_options(True)
        self._end = self._file.tell()
        self._blobs.append((name, start, self._end - start))

    def take(self) -> list[tuple[str, int, int]]:
        """(name, offset, bytes) of each file of this snapshot."""
        return list(self._blobs)

    def close(self) -> None:
        """Let go of the memory; what is in it stays while others hold it."""
        self._background.join()
        self._file.close()

    def _make_pages(self) -> None:
        with suppress(OSError):  # no room to reserve: pages are then made as they are written
            os.posix_fallocate(self._file.fileno(), 0, self._expected_bytes)

    def _make_window(self, device: torch.device, pages: threading.Thread) -> None:
        pages.join()
        with suppress(OSError):
            # A little more than expected: archives have heads, and what is beyond the window goes the slow way.
            self._window = HostWindow(self._file.fileno(), self._expected_bytes * 51 // 50, device)


def seed_everything(seed: int) -> None:
    """Seed the generators whose states a checkpoint holds."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The states of Python's, numpy's, torch's CPU and device generators, as ``rank-00000.pt`` holds them."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_random_state(path: Path) -> None:
    """Restore what `random_state` gave. It is a pickle: the caller has verified the file's hash."""
    state = torch.load(path, weights_only=False)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
