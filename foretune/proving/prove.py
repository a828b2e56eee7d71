"""Runs the matrix: a reference for each layout, then each cell, compared with it.

template of a layout (config, data, plan) ──▶ reference ──digest──┐
                                      └──▶ cell: armed, broken, recovered ──digest──▶ equal?
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from foretune import launch, planning
from foretune.artifacts import Plan, RunFolder
from foretune.checkpoint import layout as checkpoint_layout
from foretune.checkpoint import store
from foretune.config import Config
from foretune.errors import ExitCode, ForetuneError, Preempted
from foretune.events import EventKind, read_events
from foretune.faults import SUPERVISOR, Action, Fault, fired_mark, write_faults
from foretune.proving.cells import Cell, Layout
from foretune.proving.damage import WAYS, damage_newest
from foretune.proving.digest import losses, losses_digest, relative_difference, state_digest
from foretune.proving.killer import HOLD_SECONDS, Killer
from foretune.proving.verdict import CellResult, Verdict

#: Another micro-batch adds in another order: the same update up to this share of it, the same losses up to this.
_UPDATE_TOLERANCE = 1e-3
_LOSS_TOLERANCE = 1e-4
#: A cell that takes longer than this has hung for good, seconds.
_CELL_SECONDS = 300.0

#: Makes the template of a layout in a folder: configuration, prepared data and plan; no training.
MakeRun = Callable[[Layout, Path], tuple[RunFolder, Plan, Config]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Template:
    run: RunFolder
    plan: Plan
    config: Config


@dataclass(frozen=True)
class _Reference:
    checkpoint: Path
    state: str
    losses: str
    by_step: dict[int, set[float]]


def prove(
    make_run: MakeRun,
    cells: Sequence[Cell],
    *,
    out: Path,
    seed: int = 0,
    broken: Sequence[str] = (),
    agents: launch.Agents | None = None,
    on_cell: Callable[[CellResult], None] = lambda result: None,
    on_progress: Progress = lambda message: None,
) -> Verdict:
    """Run every cell and compare; the verdict is also written to ``out/prove.json``.

    Args:
        broken: parts of recovery that are left out on purpose, to see that the proof notices.
        agents: keeps warm processes from one proof to the next; ended by the caller. Its own if not given.
    """
    start = time.perf_counter()
    results, left_out = [], []
    with Prover(make_run, out=out, seed=seed, broken=broken, agents=agents, on_progress=on_progress) as prover:
        for cell in cells:
            if obstacle := prover.obstacle(cell):
                left_out.append(f"{cell.name}: {obstacle}")
                continue
            results.append(prover.run_cell(cell))
            on_cell(results[-1])
        model, ranks = prover.model, prover.world_size
    verdict = Verdict(
        **surroundings(),
        model=model,
        world_size=ranks,
        seed=seed,
        cells=results,
        left_out=tuple(left_out),
        passed=all(result.passed for result in results),
        seconds=round(time.perf_counter() - start, 1),
    )
    verdict.write(out / Verdict.file_name)
    return verdict


def surroundings() -> dict[str, Any]:
    """Date, versions and machine of a result."""
    names = ("foretune", "torch", "deepspeed", "transformers")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    return {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
        "machine": machine,
    }


class Prover:
    """References and warm processes, kept over many cells. Use as a context."""

    def __init__(
        self,
        make_run: MakeRun,
        *,
        out: Path,
        seed: int,
        broken: Sequence[str] = (),
        agents: launch.Agents | None = None,
        on_progress: Progress = lambda message: None,
    ) -> None:
        self._make_run, self._out, self._seed = make_run, out, seed
        self._broken, self._say = list(broken), on_progress
        self._templates: dict[Layout, _Template] = {}
        self._references: dict[tuple[Layout, tuple[int, ...]], _Reference] = {}
        self._agents, self._shared = agents or launch.Agents(), agents is not None
        self._number = 0
        self.model, self.world_size = "", 0

    def __enter__(self) -> Prover:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._shared:
            self._agents.end()

    def obstacle(self, cell: Cell) -> str | None:
        """Why a layout that not every model and machine can have can't be planned here; None if it can."""
        wanted = [one for one in (cell.layout, cell.then) if one is not None and (one.eight_bits or one.ranks)]
        try:
            for layout in wanted:
                self._template(layout)
        except ForetuneError as error:
            return str(error).splitlines()[0]
        return None

    def run_cell(self, cell: Cell) -> CellResult:
        """Break one run and see."""
        window = (cell.step,) if cell.expects == "equal_to_reference_without_that_window" else ()
        reference = self.reference(cell.layout, window)
        self._say(cell.name)
        start = time.perf_counter()
        run = self.fresh_run(cell.layout)
        faults = run.path / "faults.json"
        write_faults(faults, self._faults_of(cell), broken=self._broken)
        problem = None
        try:
            if cell.fault == "kill_supervisor":
                codes = self._with_supervisor_killed(cell, run, faults)
            else:
                codes = self._in_process(cell, run, faults)
        except Exception as error:  # a cell that our own code breaks on has failed, and the others go on
            codes, problem = [int(ExitCode.OUR_BUG)], f"{type(error).__name__}: {error}"
        return self._judge(cell, run, faults, reference, codes=codes, problem=problem, start=start)

    def reference(self, layout: Layout, window: tuple[int, ...] = ()) -> _Reference:
        """The uninterrupted run of a layout, without the data of `window`; made once."""
        key = (layout, window)
        if key not in self._references:
            without = f" without the data of step {window[0]}" if window else ""
            self._say(f"{layout.name}: reference{without}")
            run = self.fresh_run(layout)
            for step in window:
                run.pass_over(step)
            template = self._templates[layout]
            launch.train(run, template.plan, template.config, agents=self._agents)
            checkpoint = _newest(run)
            self._references[key] = _Reference(checkpoint, state_digest(checkpoint), losses_digest(run), losses(run))
        return self._references[key]

    def train(self, layout: Layout, run: RunFolder, **options: Any) -> None:
        """Train a run of this layout, from where it is."""
        template = self._templates[layout]
        launch.train(
            run,
            Plan.read(run.plan),
            template.config,
            agents=self._agents,
            replan=planning.after_out_of_memory,
            **options,
        )

    def fresh_run(self, layout: Layout) -> RunFolder:
        """A run of a layout that has not begun: its own configuration and plan, the template's data."""
        template = self._template(layout).run
        self.model, self.world_size = self._templates[layout].config.model, self._templates[layout].plan.world_size
        run = RunFolder(self._out / "runs" / f"{self._number:04d}")
        self._number += 1
        shutil.rmtree(run.path, ignore_errors=True)
        run.create()
        self._lay_out(run, layout)
        run.data.symlink_to(template.data.resolve())
        run.events.touch()
        return run

    def _template(self, layout: Layout) -> _Template:
        if layout not in self._templates:
            run, plan, config = self._make_run(layout, self._out / "layouts" / layout.name.replace(" ", "-"))
            self._templates[layout] = _Template(run, plan, config)
        return self._templates[layout]

    def _lay_out(self, run: RunFolder, layout: Layout) -> None:
        """Give a run the configuration and the plan of a layout."""
        template = self._template(layout).run
        for path in (template.config, template.plan, template.deepspeed_config):
            shutil.copy2(path, run.path)

    def _faults_of(self, cell: Cell) -> list[Fault]:
        """What is armed; a fault that is not in the table is called by its own name in `foretune.faults`."""
        actions: dict[str, Action] = {
            "kill_from_outside": "hold",
            "terminate": "hold",
            "kill_supervisor": "kill" if cell.rank == SUPERVISOR else "hold",
            "loader_error": "raise",
            **dict.fromkeys(WAYS, "kill"),
        }
        action = actions.get(cell.fault, cell.fault)
        armed = [Fault(action, cell.phase, cell.step, rank=cell.rank, seconds=HOLD_SECONDS)]  # type: ignore[arg-type]
        if cell.fault == "no_space":  # and what is lost by it
            armed.append(Fault("kill", "data", cell.step + 2))
        return armed

    def _in_process(self, cell: Cell, run: RunFolder, faults: Path) -> list[int]:
        """Train with this process as the supervisor; returns the exit codes that a command would have given."""
        codes: list[int] = []

        def before_restart(failure: launch.Failure) -> None:
            if cell.fault in WAYS:
                damage_newest(run.checkpoints, cell.fault, seed=cell.seed + self._seed)

        with ExitStack() as stack:
            if cell.fault in ("kill_from_outside", "terminate"):
                strike = (lambda: os.kill(os.getpid(), signal.SIGTERM)) if cell.fault == "terminate" else None
                killer = Killer(
                    run, faults, number=0, rank=cell.rank, seed=self._seed * 1000 + cell.seed, strike=strike
                )
                stack.callback(killer.close)
                killer.start()
            for layout in (cell.layout, cell.then or cell.layout):
                if layout != cell.layout:
                    self._lay_out(run, layout)
                try:
                    self.train(layout, run, faults=faults, before_restart=before_restart)
                    codes.append(int(ExitCode.DONE))
                    break
                except Preempted as error:
                    codes.append(int(error.exit_code))
                except ForetuneError as error:
                    codes.append(int(error.exit_code))
                    break
        return codes

    def _with_supervisor_killed(self, cell: Cell, run: RunFolder, faults: Path) -> list[int]:
        """Train with a supervisor of its own, which is killed; then the same command again."""
        command = [sys.executable, "-m", "foretune.launch", str(run.path), "--faults", str(faults)]
        with (run.path / "supervisor.log").open("wb") as log:
            first = subprocess.Popen(command, stdout=log, stderr=log)
            killer = Killer(
                run, faults, number=0, rank=0, seed=self._seed * 1000 + cell.seed, strike=lambda: _kill(first)
            )
            if cell.rank != SUPERVISOR:
                killer.start()
            try:
                first.wait(_CELL_SECONDS)
            finally:
                _kill(first)
                if killer.ident is not None:
                    killer.close()
            _refuse_orphans(run)
            again = subprocess.run(command, stdout=log, stderr=log, timeout=_CELL_SECONDS)
        return [first.returncode, again.returncode]

    def _judge(
        self,
        cell: Cell,
        run: RunFolder,
        faults: Path,
        reference: _Reference,
        *,
        codes: list[int],
        problem: str | None,
        start: float,
    ) -> CellResult:
        mark = fired_mark(faults, 0)
        total = Plan.read(run.plan).total_steps
        found = store.newest_complete(run.checkpoints)
        events = list(read_events(run.events))
        recovered = codes[-1] == ExitCode.DONE and found is not None and found[1].step == total
        equal, difference = False, None
        if not mark.exists():
            problem = problem or "the fault never fired"
        elif recovered and found is not None:
            equal = state_digest(found[0]) == reference.state and losses_digest(run) == reference.losses
            if cell.expects == "within_tolerance":
                difference = relative_difference(found[0], reference.checkpoint, self._first_checkpoint(reference))
                problem = _losses_problem(losses(run), reference.by_step)
                if difference > _UPDATE_TOLERANCE:
                    problem = f"the weights differ by {difference:.2g} of the update"
            elif not equal:
                problem = _first_difference(losses(run), reference.by_step)
        else:
            problem = problem or f"not recovered: exit {codes}"
        expected_codes = cell.fault != "terminate" or codes == [int(ExitCode.PREEMPTED), int(ExitCode.DONE)]
        if not expected_codes:
            problem = problem or f"exit codes {codes}, not 75 and then 0"
        starts = [event["resumed_from"] for event in events if event["kind"] == EventKind.TRAINING_STARTED]
        if cell.then is not None and not starts[-1]:
            problem = problem or "it began anew"
        result = CellResult(
            name=cell.name,
            fault=cell.fault,
            phase=cell.phase,
            stage=cell.layout.stage,
            layout=cell.layout.name,
            expects=cell.expects,
            recovered=recovered,
            steps_lost=_steps_lost(events),
            seconds_lost=_seconds_lost(events, mark),
            hash_equal=equal,
            difference=difference,
            exit_code=codes[-1],
            causes=[event["cause"] for event in events if event["kind"] == EventKind.FAULT],
            traceback=mark.read_text() if mark.exists() else "",
            passed=recovered and problem is None,
            problem=problem,
            seconds=round(time.perf_counter() - start, 2),
        )
        if result.passed and run.checkpoints != reference.checkpoint.parent:
            shutil.rmtree(run.path)
        return result

    @staticmethod
    def _first_checkpoint(reference: _Reference) -> Path:
        checkpoints = reference.checkpoint.parent
        return checkpoint_layout.folder_of(checkpoints, checkpoint_layout.complete_steps(checkpoints)[-1])


def _newest(run: RunFolder) -> Path:
    found = store.newest_complete(run.checkpoints)
    assert found is not None, "a reference left no checkpoint"
    return found[0]


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    process.wait()


def _refuse_orphans(run: RunFolder) -> None:
    """Nothing of a killed supervisor's may live on; the kernel gets a moment."""
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        left = processes_of(run.path)
        if not left:
            return
        time.sleep(0.05)
    raise RuntimeError(f"processes were left behind: {left}")


def processes_of(path: Path) -> list[int]:
    """Living processes whose command line names this run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            alive = process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
            if alive and str(path) in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def _losses_problem(found: dict[int, set[float]], expected: dict[int, set[float]]) -> str | None:
    for step, values in expected.items():
        (right,) = values
        for value in found.get(step, {float("nan")}):
            if not abs(value - right) <= _LOSS_TOLERANCE * abs(right):
                return f"the loss of step {step} is {value}, the reference's {right}"
    return None


def _first_difference(found: dict[int, set[float]], expected: dict[int, set[float]]) -> str:
    for step in sorted({*found, *expected}):
        if found.get(step) != expected.get(step):
            return f"the loss of step {step} is {found.get(step)}, the reference's {expected.get(step)}"
    return "the losses are equal, weights or states are not"


def _steps_lost(events: list[dict[str, Any]]) -> int:
    steps = [event["step"] for event in events if event["kind"] == EventKind.STEP]
    return len(steps) - len(set(steps))


def _seconds_lost(events: list[dict[str, Any]], mark: Path) -> float | None:
    """From the fault to the end of the first step after training was started again."""
    if not mark.exists():
        return None
    struck = mark.stat().st_mtime
    started = [e["time"] for e in events if e["kind"] == EventKind.TRAINING_STARTED and e["time"] > struck]
    if not started:
        return None
    steps = [e["time"] for e in events if e["kind"] == EventKind.STEP and e["time"] > started[0]]
    return round(steps[0] - struck, 3) if steps else None
