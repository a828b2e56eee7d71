"""What two runs must have in common to the last bit, as sha256: weights, optimizer states, random states, losses."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foretune.artifacts import RunFolder
from foretune.checkpoint import store
from foretune.checkpoint.consolidate import iterate_weights
from foretune.events import EventKind, read_events

#: Of DeepSpeed's files: what a run computed. The rest (its configuration, versions) says how.
_COMPUTED = ("module", "optimizer", "optimizer_state_dict", "frozen_param_fragments")


def state_digest(checkpoint: Path) -> str:
    """sha256 over the tensors and numbers of every rank's weights, optimizer states and random states.

    The files' own bytes would not do: equal states pickle differently (object identity, order of a dict).
    """
    digest = hashlib.sha256()
    for name in sorted(store.verify(checkpoint).files):
        if name.endswith(".pt"):
            state = torch.load(checkpoint / name, map_location="cpu", mmap=True, weights_only=False)
            if name.startswith("engine/"):
                state = {key: state[key] for key in _COMPUTED if key in state}
            digest.update(name.encode())
            _update(digest, state)
    return digest.hexdigest()


def losses(run: RunFolder) -> dict[int, set[float]]:
    """Every loss that was logged for a step (from 1), those of repeated steps too."""
    found: dict[int, set[float]] = {}
    for event in read_events(run.events):
        if event["kind"] == EventKind.STEP:
            found.setdefault(event["step"], set()).add(event["loss"])
    return found


def losses_digest(run: RunFolder) -> str:
    """sha256 of the loss log. A step that was repeated must have given the same loss again."""
    log = {step: sorted(values, key=str) for step, values in sorted(losses(run).items())}
    return hashlib.sha256(json.dumps(log).encode()).hexdigest()


def relative_difference(checkpoint: Path, reference: Path, start: Path) -> float:
    """Norm of the difference of two checkpoints' weights, over the norm of what training changed since `start`."""
    difference = change = 0.0
    begin = dict(iterate_weights(start))
    expected = dict(iterate_weights(reference))
    for name, tensor in iterate_weights(checkpoint):
        difference += float((tensor.double() - expected[name].double()).detach().square().sum())
        change += float((expected[name].double() - begin[name].double()).detach().square().sum())
    return math.sqrt(difference / change) if change else math.inf


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        flat = value.detach().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(value, np.ndarray):
        digest.update(value.tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _update(digest, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _update(digest, item)
    elif value is None or isinstance(value, bool | int | float | str):
        digest.update(repr(value).encode())
