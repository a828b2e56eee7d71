"""The journal: one JSON object a line, appended by whoever has something to tell.

In: events from the supervisor and from rank 0.  Out: RUN/events.jsonl, the one source of the live view, the report and
any other reader. A line is written with a single ``os.write`` on an ``O_APPEND`` descriptor, so that writers of
several processes never tear each other's lines; a reader skips a torn last line, which only a crash can leave.

Every event has ``time`` (seconds since the epoch) and ``kind``; the kinds are the names of `EventKind`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any


class EventKind(StrEnum):
    """What happened. The payload of each is stated here and nowhere else."""

    RUN_STARTED = "run_started"  # command, versions
    STAGE_STARTED = "stage_started"  # stage; for training also planned_memory_bytes of a rank
    STAGE_SKIPPED = "stage_skipped"  # stage, reason
    STAGE_FINISHED = "stage_finished"  # stage, seconds, summary (one line for people)
    PROGRESS = "progress"  # stage, message: what a stage is doing now
    NOTE = "note"  # message: something the user should know
    LAUNCH = "launch"  # ranks: they are being started
    #: step, total_steps, world_size, resumed_from, seconds_by_phase (of rank 0's start: engine, data, checkpoint …)
    TRAINING_STARTED = "training_started"
    #: step, loss, learning_rate, grad_norm, tokens, target_tokens, seconds, tokens_per_second,
    #: memory_bytes (rank 0's peak)
    STEP = "step"
    EVALUATED = "evaluated"  # step, loss, perplexity, target_tokens
    CHECKPOINT_SAVED = "checkpoint_saved"  # step, path, seconds, blocked_seconds (training waited), bytes
    STOP_REQUESTED = "stop_requested"  # reason
    FAULT = "fault"  # cause, detail, rank, step, phase
    RECOVERY = "recovery"  # action, why, wait_seconds
    BREAKDOWN = "breakdown"  # seconds_by_phase, of all launches together
    TRAINING_FINISHED = "training_finished"  # step, seconds, breakdown
    PREDICTED_AGAINST_MEASURED = "predicted_against_measured"  # quantities: name → predicted, measured


class Journal:
    """Appends events to one file. Safe to open from several processes at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, kind: EventKind, **payload: Any) -> dict[str, Any]:
        """Append one event and return it. Values must be JSON; floats that JSON lacks (NaN, inf) become strings."""
        event: dict[str, Any] = _finite({"time": round(time.time(), 3), "kind": str(kind), **payload})
        line = json.dumps(event, ensure_ascii=False, default=str) + "\n"
        os.write(self._descriptor, line.encode())
        return event

    def close(self) -> None:
        """Flush to disk and close."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)


def read_events(path: Path, *, offset: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the complete events of a journal, oldest first, from byte `offset` on. A missing file has none."""
    for event, _ in read_events_from(path, offset):
        yield event


def read_events_from(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield ``(event, next_offset)``; a reader that keeps `next_offset` can follow a growing journal."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                yield json.loads(line), offset
            except ValueError:  # a line torn by a crash, later appended to: no event
                continue


def _finite(value: Any) -> Any:
    """NaN and infinities as strings: JSON has neither, and a strict reader would refuse the line."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
