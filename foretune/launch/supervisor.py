"""Runs one training to its end: starts torchrun's elastic agent as a child, follows the journal, reads the outcomes.

    RUN/plan.json ──▶ agent ──▶ ranks ──▶ RUN/launch/outcome-*.json ──▶ return | Preempted | UserError | TrainingStopped

Signals: the first SIGINT, SIGTERM or SIGUSR1 becomes a file that rank 0 looks for after every step (the agent and the
ranks live in a session of their own and never see the terminal's Ctrl-C; torchrun's own SIGTERM means something else to
them). A second SIGINT ends the ranks at once.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from foretune.artifacts import Outcome, Plan, RunFolder
from foretune.checkpoint import layout
from foretune.errors import ForetuneError, Preempted, TrainingStopped, UserError
from foretune.events import EventKind, Journal, read_events_from

#: How often the journal is read for the live view, seconds.
_POLL_SECONDS = 0.1
#: How long the agent gets to end its ranks when it is asked to, seconds.
_SHUTDOWN_SECONDS = 30.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

EventSink = Callable[[dict[str, Any]], None]


def train(run: RunFolder, plan: Plan, *, on_event: EventSink = lambda event: None) -> None:
    """Train as planned, from the newest complete checkpoint if there is one.

    Args:
        on_event: called with every journal event that is written meanwhile.

    Raises:
        Preempted: stopped as asked, saved.
        UserError: the ranks found a mistake of the user's.
        TrainingStopped: a rank failed; names rank, step, cause and the last checkpoint.
    """
    shutil.rmtree(run.launch, ignore_errors=True)
    run.launch.mkdir(parents=True)
    run.logs.mkdir(parents=True, exist_ok=True)
    journal = Journal(run.events)
    offset = run.events.stat().st_size
    try:
        with (run.logs / "agent.log").open("ab") as log:
            agent = subprocess.Popen(
                _command(run, plan),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=_environment(plan),
                start_new_session=True,
            )
        try:
            with _stop_signals(run, journal, agent):
                while agent.poll() is None:
                    offset = _forward(run, offset, on_event)
                    time.sleep(_POLL_SECONDS)
        finally:
            _end(agent)
        _forward(run, offset, on_event)
        _conclude(run, plan, journal)
    finally:
        journal.close()


def _command(run: RunFolder, plan: Plan) -> list[str]:
    """torchrun on this node, on ports that the system chooses, so that runs side by side never collide."""
    return [
        sys.executable,
        "-m",
        "foretune.launch.child",
        f"--nproc-per-node={plan.world_size}",
        "--nnodes=1",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        f"--rdzv-id={uuid.uuid4().hex}",
        "--local-addr=127.0.0.1",
        "--max-restarts=0",
        "--monitor-interval=0.1",
        "-m",
        "foretune.training.worker",
        str(run.path),
    ]


def _environment(plan: Plan) -> dict[str, str]:
    """What the libraries below us read from the environment; nothing of ours does."""
    environment = dict(os.environ)
    # Ranks that restart in place read stale addresses from a shared store otherwise.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // plan.world_size)))
    if plan.cluster.accelerator.kind == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        # gloo otherwise looks this host's name up, which fails on many machines.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms need
    return environment


@contextmanager
def _stop_signals(run: RunFolder, journal: Journal, agent: subprocess.Popen[bytes]) -> Iterator[None]:
    """Within this, signals ask the ranks to stop instead of ending this process."""
    if threading.current_thread() is not threading.main_thread():  # a notebook's worker thread: Python forbids handlers
        yield
        return

    def handle(number: int, _frame: object) -> None:
        if run.stop_request.exists():
            if number == signal.SIGINT:
                _signal_group(agent, signal.SIGTERM)
            return
        name = signal.Signals(number).name
        journal.write(EventKind.STOP_REQUESTED, reason=name)
        run.stop_request.write_text(name)

    previous = {number: signal.signal(number, handle) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(agent: subprocess.Popen[bytes]) -> None:
    """Leave no process behind, however this one came to leave."""
    if agent.poll() is None:
        _signal_group(agent, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            agent.wait(_SHUTDOWN_SECONDS)
    # Ranks die with their agent (PR_SET_PDEATHSIG); the group's SIGKILL is for anything that they started.
    _signal_group(agent, signal.SIGKILL)
    agent.wait()


def _signal_group(agent: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(agent.pid, number)


def _forward(run: RunFolder, offset: int, on_event: EventSink) -> int:
    """Hand on the events since `offset`; returns the new offset."""
    for event, next_offset in read_events_from(run.events, offset):
        on_event(event)
        offset = next_offset
    return offset


def _conclude(run: RunFolder, plan: Plan, journal: Journal) -> None:
    """Turn the ranks' outcomes into a return or the one error that tells the cause."""
    paths = sorted(run.launch.glob("outcome-*.json"), key=lambda path: path.stat().st_mtime_ns)
    outcomes = {int(path.stem.removeprefix("outcome-")): Outcome.read(path) for path in paths}
    if len(outcomes) == plan.world_size and all(outcome.status == "done" for outcome in outcomes.values()):
        return
    if len(outcomes) == plan.world_size and all(outcome.status == "preempted" for outcome in outcomes.values()):
        raise Preempted(outcomes[0].step or 0)
    steps = layout.complete_steps(run.checkpoints)
    if run.stop_request.exists() and not any(outcome.status in ("bug", "user_error") for outcome in outcomes.values()):
        raise Preempted(steps[0] if steps else 0)  # the second Ctrl-C: the work since the last checkpoint is gone
    raise _error_of(
        run, outcomes, journal, last_checkpoint=str(layout.folder_of(run.checkpoints, steps[0])) if steps else None
    )


def _error_of(
    run: RunFolder, outcomes: dict[int, Outcome], journal: Journal, *, last_checkpoint: str | None
) -> ForetuneError:
    """The first rank that said something else than "my peer is gone" tells the cause."""
    for outcome in outcomes.values():
        if outcome.status == "user_error":
            return UserError(outcome.field or "", outcome.value, outcome.problem or "", outcome.mend or "")
    failed = {rank: outcome for rank, outcome in outcomes.items() if outcome.status in ("machine_fault", "bug")}
    telling = {
        rank: outcome for rank, outcome in failed.items() if not (outcome.cause or "").startswith("communication")
    }
    for rank, outcome in {**telling, **failed}.items():
        journal.write(EventKind.FAULT, cause=outcome.cause, rank=rank, step=outcome.step)
        cause = f"{outcome.cause} (whole story: {run.log_of(rank)})"
        return TrainingStopped(cause, rank=rank, step=outcome.step, last_checkpoint=last_checkpoint)
    cause = f"the ranks ended without a word, killed perhaps (see {run.logs})"
    journal.write(EventKind.FAULT, cause=cause, rank=None, step=None)
    return TrainingStopped(cause, last_checkpoint=last_checkpoint)
