"""What went wrong, as a typed cause: from exit codes, signals, what ranks wrote, heartbeats, the kernel's counts.

The first cause counts: when one rank dies its peers fail too, with words about communication that explain nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from foretune.artifacts import Outcome
from foretune.launch.agent_process import Exits


class Cause(StrEnum):
    """Why training stopped. The policy of each: `foretune.launch.policy`."""

    KILLED = "killed"  # by a signal from outside
    CRASHED = "crashed"  # an exception that is nobody's known fault
    HOST_OUT_OF_MEMORY = "host_out_of_memory"  # the kernel's OOM killer
    DEVICE_OUT_OF_MEMORY = "device_out_of_memory"
    NON_FINITE = "non_finite"  # loss or gradient
    LOSS_SPIKE = "loss_spike"
    HANG = "hang"
    DATA = "data"  # a row that can't be loaded
    COMMUNICATION = "communication"  # and no rank that says why
    AGENT_LOST = "agent_lost"  # torchrun's agent or the warm spare ended


@dataclass(frozen=True)
class Failure:
    """One failure of a launch.

    Attributes:
        rank: the guilty one, if there is one.
        step: steps done when it happened; for a bad loss the step number whose data window gave it.
        phase: what the rank was doing by its last heartbeat.
        detail: one sentence for people.
    """

    cause: Cause
    detail: str
    rank: int | None = None
    step: int | None = None
    phase: str | None = None


def classify(
    outcomes: Mapping[int, Outcome],
    exits: Exits,
    *,
    phases: Mapping[int, tuple[str, int]],
    oom_kills: int,
    log_of: Mapping[int, Path],
) -> Failure:
    """The one cause that explains a launch that ended badly.

    Args:
        outcomes: what ranks wrote, by rank, in the order they wrote it.
        exits: how they ended.
        phases: (phase, steps done) of the last heartbeat, by rank.
        oom_kills: processes that the kernel's OOM killer ended during this launch.
        log_of: where each rank's words are.
    """

    def failure(cause: Cause, rank: int, detail: str, step: int | None = None) -> Failure:
        phase, beaten = phases.get(rank, (None, None))
        return Failure(cause, detail, rank=rank, step=beaten if step is None else step, phase=phase)

    told = {rank: outcome for rank, outcome in outcomes.items() if outcome.status in ("machine_fault", "bug")}
    for rank, outcome in told.items():
        if outcome.kind in set(Cause) and outcome.kind != Cause.COMMUNICATION:
            return failure(Cause(outcome.kind), rank, outcome.cause or outcome.kind, outcome.step)
    # Not told, and dead by a signal: the victim. Peers that the agent killed were waiting in a collective.
    silent = [rank for rank in exits.first or exits.codes if exits.codes.get(rank, 0) < 0 and rank not in outcomes]
    if silent:
        if oom_kills:
            rank = silent[0]
            detail = "the kernel's OOM killer ended it: the host's memory is full"
            return failure(Cause.HOST_OUT_OF_MEMORY, rank, detail)
        rank = _first_victim(silent, phases)
        name = signal.Signals(-exits.codes[rank]).name
        return failure(Cause.KILLED, rank, f"ended by {name}")
    for rank, outcome in told.items():
        if outcome.status == "bug":
            return failure(Cause.CRASHED, rank, f"{outcome.cause} (whole story: {log_of[rank]})", outcome.step)
    for rank, outcome in told.items():
        return failure(Cause.COMMUNICATION, rank, outcome.cause or "communication failed", outcome.step)
    for rank, code in exits.codes.items():
        if code != 0:
            return failure(Cause.CRASHED, rank, f"exited with {code} (see {log_of[rank]})")
    return Failure(Cause.AGENT_LOST, "the agent that watches the ranks ended")


def _first_victim(silent: list[int], phases: Mapping[int, tuple[str, int]]) -> int:
    """Of several that died without a word, the one furthest behind: the others went on until they missed it."""
    return min(silent, key=lambda rank: (phases.get(rank, ("", 0))[1], rank))
