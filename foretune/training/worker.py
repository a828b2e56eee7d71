"""A rank's main: builds everything in order, then calls the loop.

    python -m foretune.training.worker RUN [--snapshots FOLDER NUMBER ...] [--faults FILE]

plan, config, data ─▶ process group ─▶ engine ─▶ loader ─▶ resume ─▶ hooks ─▶ loop ─▶ outcome file

A warm spare forks it (`foretune.training.spare`), or torchrun starts it. It decides nothing: what is to be done stands
in RUN/config.yaml and RUN/plan.json. It reports by writing RUN/launch/outcome-00000.json and exits 0 when it did what
it was asked (finished, or stopped as asked); any other exit makes the agent end the other ranks.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

from foretune.artifacts import Outcome, Plan, PreparedDataset, RunFolder
from foretune.config import load_config
from foretune.distributed import RankInfo, die_with_parent, leave, rank_info
from foretune.errors import MachineFault, UserError
from foretune.events import EventKind, Journal
from foretune.faults import Faults
from foretune.heartbeat import Heartbeat
from foretune.logger import configure
from foretune.training.assignment import Assignment


def main(arguments: list[str] | None = None) -> int:
    """Run one rank to its end; returns the exit code."""
    die_with_parent()
    parser = argparse.ArgumentParser(prog="foretune.training.worker")
    parser.add_argument("run", type=Path)
    parser.add_argument("--snapshots", nargs="+", metavar="FOLDER NUMBER", help="the memory of each local rank")
    parser.add_argument("--faults", type=Path)
    options = parser.parse_args(arguments)
    run = RunFolder(options.run)
    rank = rank_info()
    _write_log_to(run.log_of(rank.rank))
    configure(prefix=f"[rank {rank.rank}] ")
    heartbeat = _start_heart(run, rank)
    try:
        outcome = _train(run, rank, heartbeat, options)
    except UserError as error:
        outcome = Outcome.of_user_error(error)
    except MachineFault as error:
        traceback.print_exc()
        outcome = Outcome(status="machine_fault", cause=error.cause, step=error.step, kind=error.kind)
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome(status="bug", cause=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
    outcome.write(run.outcome_of(rank.rank))
    return 0 if outcome.status in ("done", "preempted") else 1


def _start_heart(run: RunFolder, rank: RankInfo) -> Heartbeat:
    """Beat for the first time, and be ready to dump the stack when the supervisor asks where this rank hangs."""
    run.launch.mkdir(parents=True, exist_ok=True)
    heartbeat = Heartbeat(run.heartbeat_of(rank.rank))
    heartbeat.beat("start", 0)
    stack = run.stack_of(rank.rank).open("a")
    faulthandler.register(signal.SIGUSR2, file=stack, all_threads=True)
    return heartbeat


def _snapshot_bytes(plan: Plan, rank: RankInfo) -> int:
    """Of this rank: an equal part of the states; below ZeRO-3 the weights besides, which rank 0 writes alone."""
    trained = plan.trainable_parameters if plan.method == "lora" else plan.parameters
    weights = trained * (4 if plan.precision == "fp32" else 2) if plan.zero_stage < 3 else 0
    states = max(0, plan.predicted.checkpoint_bytes - weights) // plan.world_size
    return states + (weights if rank.is_main else 0)


def _train(run: RunFolder, rank: RankInfo, heartbeat: Heartbeat, options: argparse.Namespace) -> Outcome:
    # Imported here: what is wrong with the arguments or the artifacts is said without waiting for torch.
    from foretune.checkpoint.snapshot import MemoryWriter
    from foretune.engine import close_group, open_group
    from foretune.training import build
    from foretune.training.clock import Laps
    from foretune.training.injection import FaultyEngine
    from foretune.training.loop import train
    from foretune.training.resume import NewestCheckpoint, resume
    from foretune.training.schedule import learning_rate

    laps = Laps()
    plan = Plan.read(run.plan)
    memory = None
    if options.snapshots is not None:
        folder, *numbers = options.snapshots
        size = _snapshot_bytes(plan, rank)
        memory = MemoryWriter(Path(folder) / numbers[rank.local_rank], expected_bytes=size)
    assignment = Assignment(
        run=run,
        config=load_config(run.config),
        plan=plan,
        prepared=PreparedDataset.read(run.data / PreparedDataset.file_name),
        rank=rank,
        journal=Journal(run.events) if rank.is_main else None,
        heartbeat=heartbeat,
        faults=Faults(options.faults, rank=rank.rank),
        memory=memory,
        passed_over=run.passed_over_steps(),
        packs=run.packing_found(),
    )
    newest = NewestCheckpoint(assignment)
    laps.lap("artifacts")
    device = open_group(rank, deterministic=assignment.config.train.deterministic)
    laps.lap("process group")
    engine, model = build.build_engine(assignment, device)
    laps.lap("engine")
    loader = build.build_loader(assignment, engine)
    laps.lap("data")
    state, resumed_from = resume(assignment, engine, newest)
    laps.lap("checkpoint")
    if assignment.faults.armed:
        FaultyEngine.arm(engine, assignment.faults, state)
    pace = build.build_pace(assignment, step=state.step)
    hooks = build.build_hooks(assignment, engine, model, loader, pace=pace)
    assignment.tell(
        EventKind.TRAINING_STARTED,
        step=state.step,
        total_steps=plan.total_steps,
        world_size=rank.world_size,
        resumed_from=resumed_from,
        seconds_by_phase=laps.seconds,
    )
    start = time.perf_counter()
    finished = train(
        engine,
        loader,
        state,
        total_steps=plan.total_steps,
        learning_rate=partial(
            learning_rate,
            peak=plan.learning_rate,
            warmup_steps=plan.warmup_steps,
            total_steps=plan.total_steps,
            schedule=plan.schedule,
        ),
        hooks=hooks,
        stop_requested=lambda: rank.is_main and run.stop_request.exists(),
        save_due=lambda step: pace is not None and pace.due(step),
        enter=assignment.enter,
        passed_over=assignment.passed_over,
        spike=assignment.config.recover.loss_spike,
        skips_overflow=plan.precision == "fp16",
    )
    heartbeat.beat("end", state.step)
    breakdown = state.breakdown()
    assignment.tell(EventKind.BREAKDOWN, seconds_by_phase=breakdown)
    assignment.tell(
        EventKind.TRAINING_FINISHED,
        step=state.step,
        finished=finished,
        seconds=round(time.perf_counter() - start, 3),
        breakdown=breakdown,
    )
    engine.barrier()
    close_group()
    return Outcome(status="done" if finished else "preempted", step=state.step)


def _write_log_to(path: Path) -> None:
    """Send everything this process prints, C libraries included, to a file of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())


if __name__ == "__main__":
    leave(main())
