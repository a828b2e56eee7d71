"""Where DeepSpeed's saves go: to a writer of ours instead of to files. And its loads: mapped instead of read whole.

DeepSpeed hands every file of a checkpoint to its checkpoint-engine object; that object is exchanged for the time of one
save. What it would do around it (folders, a recovery script, the ``latest`` file) has no meaning for us.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from foretune.checkpoint.consolidate import load_mapped
from foretune.checkpoint.snapshot import StateWriter

#: Stands for the folder that DeepSpeed believes it saves into; nothing is ever written there.
_ROOT = os.path.join(os.sep, "nowhere")


class _Redirect(CheckpointEngine):  # type: ignore[misc]
    """Hands each file to a writer, under its path below the root."""

    def __init__(self, write: StateWriter) -> None:
        super().__init__()
        self._write = write

    def create(self, info: CheckpointCommitInfo) -> None:
        return None

    def save(self, state_dict: Any, path: str) -> None:
        self._write(os.path.relpath(path, _ROOT), state_dict)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        return None

    def load(self, path: str, map_location: Any = None) -> Any:
        raise AssertionError("a save loads nothing")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


@contextmanager
def redirected_saves(engine: Any, write: StateWriter) -> Iterator[str]:
    """Within this, ``engine.save_checkpoint`` with the yielded folder writes through `write`."""
    before = engine.checkpoint_engine
    engine.checkpoint_engine = _Redirect(write)
    engine._copy_recovery_script = _nothing
    try:
        yield _ROOT
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script


@contextmanager
def mapped_loads(engine: Any) -> Iterator[None]:
    """Within this, ``engine.load_checkpoint`` maps its files: no copy of a rank's states in host memory besides."""
    checkpoint_engine = engine.checkpoint_engine
    checkpoint_engine.load = _load_mapped
    try:
        yield
    finally:
        del checkpoint_engine.load


def _load_mapped(path: str, map_location: Any = None) -> Any:
    return load_mapped(Path(path))


def _nothing(*_: Any) -> None:
    return None
