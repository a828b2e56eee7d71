"""Names inside RUN/checkpoints/. No torch.

step-00000120/                 complete: it got this name last
    manifest.json              `foretune.artifacts.Checkpoint`
    engine/                    what DeepSpeed wrote
    rank-00000.pt              random-number states of one rank
    device-states-00000.pt     optimizer states of one rank that are in 8 bits, or not in the share that is offloaded
    reference.safetensors      logits that an export must reproduce (last checkpoint of a training)
    adapter_config.json        peft's, for LoRA
.step-00000240.partial/        being written, or left by a crash: never read
"""

from __future__ import annotations

import re
from pathlib import Path

from foretune.artifacts import Checkpoint

MANIFEST = Checkpoint.file_name
REFERENCE = "reference.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
#: In RUN/launch/saving/: what a snapshot in memory holds, and the files of it that are on disk already.
READY = "ready.json"
EXTRAS = "extras"
_COMPLETE = re.compile(r"step-(\d{8,})")


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the complete checkpoint of a step stands."""
    return checkpoints / f"step-{step:08d}"


def partial_folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is complete."""
    return checkpoints / f".step-{step:08d}.partial"


def rank_file(rank: int) -> str:
    """Name of one rank's file."""
    return f"rank-{rank:05d}.pt"


def device_states_file(rank: int) -> str:
    """Name of one rank's optimizer states that DeepSpeed does not save: in 8 bits, or left by a partial offload."""
    return f"device-states-{rank:05d}.pt"


def complete_steps(checkpoints: Path) -> list[int]:
    """Steps that have a complete checkpoint, newest first."""
    if not checkpoints.is_dir():
        return []
    matches = (_COMPLETE.fullmatch(path.name) for path in checkpoints.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def newest_step(checkpoints: Path) -> int:
    """The step of the newest complete checkpoint, unverified; 0 without one."""
    return next(iter(complete_steps(checkpoints)), 0)
