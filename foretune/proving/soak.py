"""Kills at random times for some minutes, then compares: what a bad week does to a machine, in a short while."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

from foretune.artifacts import RunFolder
from foretune.checkpoint import store
from foretune.errors import ForetuneError
from foretune.events import EventKind, read_events
from foretune.launch import Agents
from foretune.proving.cells import Layout
from foretune.proving.digest import losses_digest, state_digest
from foretune.proving.killer import kill_rank
from foretune.proving.prove import MakeRun, Progress, Prover, surroundings
from foretune.proving.verdict import SoakVerdict
from foretune.reporting.goodput import Goodput, goodput

#: Mean time between the first step after a start and the next kill, seconds.
_MEAN_SECONDS = 0.8


def soak(
    make_run: MakeRun,
    *,
    out: Path,
    layout: Layout,
    minutes: float,
    seed: int = 0,
    agents: Agents | None = None,
    on_progress: Progress = lambda message: None,
) -> SoakVerdict:
    """Train the same run again and again for `minutes`, killing random ranks at random times; compare each end.

    Args:
        make_run: its configuration must allow as many restarts as there will be.
        agents: keeps warm processes from one proof to the next; ended by the caller. Its own if not given.
    """
    start = time.perf_counter()
    chance = random.Random(seed)
    kills = runs = wrong = 0
    account = Goodput()
    with Prover(make_run, out=out, seed=seed, agents=agents, on_progress=on_progress) as prover:
        reference = prover.reference(layout)
        begin = time.perf_counter()
        while time.perf_counter() - begin < 60 * minutes:
            run = prover.fresh_run(layout)
            striker = _Striker(run, seed=chance.randrange(2**32), ranks=prover.world_size)
            striker.start()
            how = "NOT equal"
            try:
                prover.train(layout, run)
            except ForetuneError as error:  # it gave up, which no number of kills may make it do
                how = str(error)
            finally:
                striker.close()
            found = store.newest_complete(run.checkpoints)
            right = found is not None and state_digest(found[0]) == reference.state
            right = right and losses_digest(run) == reference.losses
            kills, runs, wrong = kills + striker.kills, runs + 1, wrong + (not right)
            account += goodput(read_events(run.events))
            on_progress(f"run {runs}: {striker.kills} kills, {'equal' if right else how}; {kills} kills so far")
    verdict = SoakVerdict(
        **surroundings(),
        seed=seed,
        kills=kills,
        runs=runs,
        wrong=wrong,
        **account.as_json(),
        seconds=round(time.perf_counter() - start, 1),
        passed=wrong == 0,
    )
    verdict.write(out / SoakVerdict.file_name)
    return verdict


class _Striker(threading.Thread):
    """Kills a random rank a random while after each start has made its first step."""

    def __init__(self, run: RunFolder, *, seed: int, ranks: int) -> None:
        super().__init__(name="striker", daemon=True)
        self._run_folder, self._chance, self._ranks = run, random.Random(seed), ranks
        self._ended = threading.Event()
        self.kills = 0

    def run(self) -> None:
        handled = 0
        while not self._ended.wait(0.01):
            steps = sum(event["kind"] == EventKind.STEP for event in read_events(self._run_folder.events))
            if steps <= handled:
                continue
            if self._ended.wait(self._chance.expovariate(1 / _MEAN_SECONDS)):
                return
            self.kills += kill_rank(self._run_folder, self._chance.randrange(self._ranks))
            time.sleep(0.3)  # the journal's last words of the victims
            handled = sum(event["kind"] == EventKind.STEP for event in read_events(self._run_folder.events))

    def close(self) -> None:
        self._ended.set()
        self.join()
