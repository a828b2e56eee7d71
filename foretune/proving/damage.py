"""What disks and people do to checkpoints."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from foretune.checkpoint import layout


def damage_newest(checkpoints: Path, how: str, *, seed: int) -> None:
    """Damage the newest complete checkpoint: flip_bit, truncate, delete_manifest or remove_newest."""
    folder = layout.folder_of(checkpoints, layout.complete_steps(checkpoints)[0])
    WAYS[how](folder, random.Random(seed))


def _shard(folder: Path) -> Path:
    """The largest of the engine's files."""
    return max((folder / "engine").glob("*.pt"), key=lambda path: path.stat().st_size)


def _flip_bit(folder: Path, chance: random.Random) -> None:
    path = _shard(folder)
    with path.open("r+b") as file:
        position = chance.randrange(path.stat().st_size)
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << chance.randrange(8))]))


def _truncate(folder: Path, chance: random.Random) -> None:
    path = _shard(folder)
    with path.open("r+b") as file:
        file.truncate(chance.randrange(path.stat().st_size))


#: What can be done to one, by name.
WAYS: dict[str, Callable[[Path, random.Random], None]] = {
    "flip_bit": _flip_bit,
    "truncate": _truncate,
    "delete_manifest": lambda folder, _: (folder / layout.MANIFEST).unlink(),
    "remove_newest": lambda folder, _: shutil.rmtree(folder),
}
