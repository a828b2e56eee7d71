"""What a save costs, and how soon training is back after a kill, for a real model on this machine.

    python bench/recovery.py --model FOLDER --data ROWS.jsonl [--kills 5] [--zero-stage 2] [--ranks 2]

One training in fp32 that saves every few steps; between saves a rank that another process picked gets SIGKILL. From the
journal: how long each save held training up and took until it was complete; from each kill to the end of the next
step, and where that time went. Medians count.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from measuring import machine, save_result

from foretune import launch
from foretune.artifacts import RunFolder
from foretune.config import parse_config
from foretune.events import EventKind, read_events
from foretune.pipeline.road import travel
from foretune.proving.killer import kill_rank

EVERY = 6
#: A kill comes so many steps after training was started: its save is being written, or is complete.
STEPS_BEFORE = 8


class Assassin(threading.Thread):
    """Kills a random rank `kills` times; remembers when."""

    def __init__(self, run: RunFolder, *, kills: int, ranks: int) -> None:
        super().__init__(daemon=True)
        self._folder, self._kills, self._ranks = run, kills, ranks
        self._ended = threading.Event()
        self.times: list[float] = []

    def run(self) -> None:
        chance = random.Random(0)
        while len(self.times) < self._kills and not self._ended.wait(0.05):
            events = list(read_events(self._folder.events))
            starts = [event["time"] for event in events if event["kind"] == EventKind.TRAINING_STARTED]
            if not starts or (self.times and starts[-1] < self.times[-1]):
                continue
            steps = [e for e in events if e["kind"] == EventKind.STEP and e["time"] > starts[-1]]
            if len(steps) >= STEPS_BEFORE:
                self._ended.wait(chance.uniform(0, 1))
                struck = time.time()
                if kill_rank(self._folder, chance.randrange(self._ranks)):
                    self.times.append(struck)

    def close(self) -> None:
        self._ended.set()
        self.join()


def parts_of(events: list[dict[str, Any]], struck: float) -> dict[str, float]:
    """Where the time from a kill to the end of the next step went, seconds."""
    after = [event for event in events if event["time"] > struck]
    started = next(event for event in after if event["kind"] == EventKind.TRAINING_STARTED)
    launched = next(event["time"] for event in after if event["kind"] == EventKind.LAUNCH)
    step = next(e["time"] for e in after if e["kind"] == EventKind.STEP and e["time"] > started["time"])
    phases = started["seconds_by_phase"]
    return {
        "noticed, snapshot written": launched - struck,
        **phases,
        "fork and the rest of the start": started["time"] - launched - sum(phases.values()),
        "first step": step - started["time"],
        "all": step - struck,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="foretune-recovery-"))
    config = parse_config(
        {
            "model": options.model,
            "data": options.data,
            "train": {
                "max_steps": (options.kills + 1) * (STEPS_BEFORE + EVERY),
                "global_batch_size": options.ranks,
                "max_length": 128,
                "precision": "fp32",
            },
            "plan": {"zero_stage": options.zero_stage, "micro_batch_size_per_gpu": 1},
            "checkpoint": {"every": EVERY, "keep": 1},
            "recover": {"restarts_per_hour": 1000},
        }
    )
    try:
        plan = travel(config, out=folder / "run", nproc=options.ranks, until="plan").plan
        assert plan is not None
        run = RunFolder(folder / "run")
        assassin = Assassin(run, kills=options.kills, ranks=options.ranks)
        assassin.start()
        try:
            launch.train(run, plan, config)
        finally:
            assassin.close()
        events = list(read_events(run.events))
    finally:
        shutil.rmtree(folder)
    saves = [event for event in events if event["kind"] == EventKind.CHECKPOINT_SAVED]
    steps = [event["seconds"] for event in events if event["kind"] == EventKind.STEP]
    kills = [parts_of(events, struck) for struck in assassin.times]
    values = {
        **machine(),
        "model": Path(options.model).name,
        "layout": f"{options.ranks} ranks, ZeRO-{options.zero_stage}, fp32",
        "step_seconds": round(statistics.median(steps), 3),
        "checkpoint_bytes": saves[-1]["bytes"],
        "saves": len(saves),
        "save_blocked_seconds": round(statistics.median(e["blocked_seconds"] for e in saves), 3),
        "save_seconds": round(statistics.median(e["seconds"] for e in saves), 3),
        "kills": len(kills),
        "back_after_seconds": {part: round(statistics.median(k[part] for k in kills), 2) for part in kills[0]},
        "each": [{part: round(value, 3) for part, value in kill.items()} for kill in kills],
    }
    print(json.dumps({key: value for key, value in values.items() if key not in ("versions", "each")}, indent=1))
    save_result("recovery", values)


if __name__ == "__main__":
    main()
