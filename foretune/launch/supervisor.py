"""Runs one training to its end through whatever happens: starts the ranks, watches, classifies, recovers.

    agent ──▶ ranks ──▶ heartbeats, outcomes, journal ──▶ what ended it? ──policy──▶ again | replan | pass over | stop
                  └──▶ snapshots ──persister──▶ checkpoints

Signals: the first SIGINT, SIGTERM or SIGUSR1 becomes a file that rank 0 looks for after every step (the agent and the
ranks live in a session of their own and never see the terminal's Ctrl-C; torchrun's own SIGTERM means something else to
them). A second SIGINT ends the ranks at once.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from foretune.artifacts import Outcome, Plan, RunFolder
from foretune.checkpoint import layout, store
from foretune.config import Config
from foretune.errors import Preempted, TrainingStopped, UserError
from foretune.events import EventKind, Journal, read_events_from
from foretune.faults import SUPERVISOR, Faults
from foretune.launch.agent_process import AgentProcess, Agents, Exits
from foretune.launch.failures import Cause, Failure, classify
from foretune.launch.health import Hang, Health, oom_kills
from foretune.launch.persister import Persister
from foretune.launch.policy import Action, Policy

#: How often ranks, journal and heartbeats are looked at, seconds.
_POLL_SECONDS = 0.05
#: Of the host memory that is free, what snapshots may take.
_SNAPSHOT_SHARE = 0.5
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

EventSink = Callable[[dict[str, Any]], None]
#: Makes another plan after the device's memory did not do; None if there is none left.
Replan = Callable[[Plan], Plan | None]


def train(
    run: RunFolder,
    plan: Plan,
    config: Config,
    *,
    on_event: EventSink = lambda event: None,
    replan: Replan = lambda plan: None,
    faults: Path | None = None,
    before_restart: Callable[[Failure], None] = lambda failure: None,
    agents: Agents | None = None,
) -> Plan:
    """Train as planned, from the newest complete checkpoint if there is one. Returns the plan that it ended with.

    Args:
        on_event: called with every journal event that is written meanwhile.
        replan: asked for another plan when the device ran out of memory.
        faults: file of faults to inject (`foretune.faults`).
        agents: keeps the warm processes of earlier trainings; ended by the caller. Ours alone if not given.
        before_restart: called between a failure and the restart (the proof damages checkpoints there).

    Raises:
        Preempted: stopped as asked, saved.
        UserError: the ranks found a mistake of the user's.
        TrainingStopped: it can't go on; names rank, step, cause and the last checkpoint.
    """
    run.logs.mkdir(parents=True, exist_ok=True)
    journal = Journal(run.events)
    supervisor = _Supervisor(
        run,
        plan,
        config,
        journal=journal,
        on_event=on_event,
        replan=replan,
        faults=faults,
        agents=agents or Agents(),
    )
    try:
        return supervisor.train(before_restart)
    finally:
        if agents is None:
            supervisor.agents.end()
        journal.close()


@dataclass
class _Supervisor:
    run: RunFolder
    plan: Plan
    config: Config
    journal: Journal
    on_event: EventSink
    replan: Replan
    faults: Path | None
    agents: Agents
    offset: int = field(init=False)

    def __post_init__(self) -> None:
        self.offset = self.run.events.stat().st_size
        self.policy = Policy(self.config.recover, clock=time.monotonic)

    def train(self, before_restart: Callable[[Failure], None]) -> Plan:
        _fresh(self.run.launch)
        with ExitStack() as stack:
            log = stack.enter_context((self.run.logs / "agent.log").open("ab"))
            persister, memories = self._persister()
            if persister is not None:
                stack.callback(_close_all, memories)
                stack.callback(persister.close)
            stack.enter_context(self._stop_signals())
            while True:
                failure = self._launch(log, memories)
                if persister is not None:
                    persister.finish()  # a snapshot that outlived its ranks is the newest checkpoint
                    if persister.error is not None:
                        raise persister.error
                self._forward()
                if failure is None:
                    self._check_last_checkpoint()
                    return self.plan
                self._recover(failure)
                before_restart(failure)

    def _launch(self, log: Any, memories: list[int]) -> Failure | None:
        """Start the ranks and wait for their end. None: they finished their training."""
        run = self.run
        for path in [*run.launch.glob("outcome-*.json"), *run.launch.glob("heartbeat-*")]:
            path.unlink()
        # A crash within a save: its snapshot is not whole. One that is whole has been written by now.
        _fresh(run.saving)
        self._tell(EventKind.LAUNCH, ranks=self.plan.world_size)
        agent = self.agents.living(run.path, log=log, environment=_environment(self.plan))
        killed = oom_kills()
        health = Health(run, ranks=self.plan.world_size, hang_seconds=_seconds(self.config.recover.hang_seconds))
        agent.launch(ranks=self.plan.world_size, arguments=self._arguments(memories))
        try:
            exits, hang = self._watch(agent, health)
        except BaseException:
            self.agents.kill()  # however this ends, no rank trains on
            raise
        self._forward()
        phases = {rank: (beat.phase, beat.step) for rank, beat in health.beats().items()}
        # Without an agent there are no ranks either, and no exit codes.
        return self._conclude(exits or Exits(), phases, hang, oom_kills() - killed)

    def _watch(self, agent: AgentProcess, health: Health) -> tuple[Exits | None, Hang | None]:
        """Until all ranks have ended, or the agent is gone; a hang is ended here."""
        hang: Hang | None = None
        while (exits := agent.exits()) is None and agent.alive:
            for event in self._forward():
                if event["kind"] == EventKind.STEP:
                    health.took_step(event["seconds"])
                    self.policy.progressed(event["step"])
            if hang is None and (hang := health.hang()) is not None:
                _kill(health)
            time.sleep(_POLL_SECONDS)
        return exits, hang

    def _conclude(
        self, exits: Exits, phases: dict[int, tuple[str, int]], hang: Hang | None, oom_kills: int
    ) -> Failure | None:
        """What the end of a launch means."""
        run, plan = self.run, self.plan
        paths = sorted(run.launch.glob("outcome-*.json"), key=lambda path: path.stat().st_mtime_ns)
        outcomes = {int(path.stem.removeprefix("outcome-")): Outcome.read(path) for path in paths}
        statuses = {outcome.status for outcome in outcomes.values()}
        if len(outcomes) == plan.world_size and statuses == {"done"}:
            return None
        for outcome in outcomes.values():
            if outcome.status == "user_error":
                raise UserError(outcome.field or "", outcome.value, outcome.problem or "", outcome.mend or "")
        if len(outcomes) == plan.world_size and statuses == {"preempted"}:
            raise Preempted(outcomes[0].step or 0)
        if run.stop_request.exists() and "bug" not in statuses:
            # The second Ctrl-C, or a failure while stopping: the work since the last checkpoint is gone.
            raise Preempted(layout.newest_step(self.run.checkpoints))
        if hang is not None:
            detail = f"it did not move for {hang.seconds:.0f} s in {hang.phase}: {hang.where}"
            return Failure(Cause.HANG, detail, rank=hang.rank, step=hang.step, phase=hang.phase)
        logs = {rank: run.log_of(rank) for rank in range(plan.world_size)}
        return classify(outcomes, exits, phases=phases, oom_kills=oom_kills, log_of=logs)

    def _recover(self, failure: Failure) -> None:
        """Do what the policy says, or raise `TrainingStopped`."""
        self._tell(
            EventKind.FAULT,
            cause=str(failure.cause),
            detail=failure.detail,
            rank=failure.rank,
            step=failure.step,
            phase=failure.phase,
        )
        action = self.policy.decide(failure)
        if action.kind == "replan":
            plan = self.replan(self.plan)
            if plan is None:
                action = Action("stop", "the smallest micro-batch with every layer recomputed does not fit either")
            else:
                self.plan = plan
                self.run.write_plan(plan)
        elif action.kind == "pass_over":
            assert failure.step is not None
            self.run.pass_over(failure.step)
        self._tell(EventKind.RECOVERY, action=action.kind, why=action.why, wait_seconds=action.wait_seconds)
        if action.kind == "stop":
            saved = layout.newest_step(self.run.checkpoints)
            last = str(layout.folder_of(self.run.checkpoints, saved)) if saved else None
            cause = f"{failure.detail}; {action.why}"
            raise TrainingStopped(cause, rank=failure.rank, step=failure.step, last_checkpoint=last)
        deadline = time.monotonic() + action.wait_seconds
        while time.monotonic() < deadline:
            if self.run.stop_request.exists():
                raise Preempted(layout.newest_step(self.run.checkpoints))
            time.sleep(_POLL_SECONDS)

    def _check_last_checkpoint(self) -> None:
        """Training that ended well has its last checkpoint on disk; a full disk may have prevented it."""
        found = store.newest_complete(self.run.checkpoints)
        if found is None or found[1].step < self.plan.total_steps:
            last = str(found[0]) if found else None
            raise TrainingStopped(
                "training ended, but its last checkpoint could not be written: free space and run the same command",
                step=self.plan.total_steps,
                last_checkpoint=last,
            )

    def _persister(self) -> tuple[Persister | None, list[int]]:
        """The memory for snapshots, where it is wanted and host memory has room for it."""
        size = self.plan.predicted.checkpoint_bytes
        free = psutil.virtual_memory().available
        if not self.config.checkpoint.background:
            return None, []
        if size > free * _SNAPSHOT_SHARE:
            message = f"saves are synchronous: a copy of {size:,} bytes has no room in {free:,} free bytes of memory"
            self._tell(EventKind.NOTE, message=message)
            return None, []
        memories = [os.memfd_create(f"foretune-snapshot-{rank}") for rank in range(self.plan.world_size)]
        persister = Persister(
            self.run,
            memories=memories,
            retention=self.config.checkpoint,
            journal=self.journal,
            faults=Faults(self.faults, rank=SUPERVISOR),
        )
        return persister, memories

    def _arguments(self, memories: list[int]) -> list[str]:
        arguments = [str(self.run.path)]
        if memories:
            arguments += ["--snapshots", f"/proc/{os.getpid()}/fd", *map(str, memories)]
        if self.faults is not None:
            arguments += ["--faults", str(self.faults)]
        return arguments

    def _forward(self) -> list[dict[str, Any]]:
        """Hand on the events since the last call, and return them."""
        events = []
        for event, offset in read_events_from(self.run.events, self.offset):
            self.offset = offset
            self.on_event(event)
            events.append(event)
        return events

    def _tell(self, kind: EventKind, **payload: Any) -> None:
        self.journal.write(kind, **payload)

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """Within this, signals ask the ranks to stop instead of ending this process."""
        if threading.current_thread() is not threading.main_thread():  # a notebook's thread: Python forbids handlers
            yield
            return

        def handle(number: int, _frame: object) -> None:
            if self.run.stop_request.exists():
                if number == signal.SIGINT:
                    self.agents.kill()
                return
            name = signal.Signals(number).name
            self._tell(EventKind.STOP_REQUESTED, reason=name)
            self.run.stop_request.write_text(name)

        previous = {number: signal.signal(number, handle) for number in _STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


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
        # Asking the driver itself would keep the forked ranks from using the GPU.
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        of_its_own = environment.get("TORCHINDUCTOR_CACHE_DIR") in (None, _torchs_place_for_compiled())
        if of_its_own and (compiled := _place_for_compiled()) is not None:
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(compiled)
    return environment


def _torchs_place_for_compiled() -> str:
    """What torch names in the environment as its compiler is imported, as preparing data may do, or a parent process.

    So it is no user's choice; of one who names this very folder it is not told apart. (As in
    torch/_inductor/runtime/cache_dir_utils.py, which can't be asked without torch.)
    """
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):
        user = f"uid_{os.getuid()}"
    sanitized = re.sub(r'[\\/:*?"<>|]', "_", user)
    return os.path.abspath(os.path.join(tempfile.gettempdir(), f"torchinductor_{sanitized}"))


def _place_for_compiled() -> Path | None:
    """Where torch keeps what it compiles from one start to the next; None where this user can't write at home.

    torch chooses a place below /tmp as soon as its compiler is imported, and makes what it is given then or fails.
    """
    try:
        folder = Path.home() / ".cache" / "foretune" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _kill(health: Health) -> None:
    """SIGKILL every rank; the agent sees it."""
    for beat in health.beats().values():
        with suppress(ProcessLookupError):
            os.kill(beat.pid, signal.SIGKILL)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _seconds(value: float | str) -> float | None:
    return None if isinstance(value, str) else float(value)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
