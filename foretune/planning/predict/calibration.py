"""What runs on this machine took against what was predicted: a factor on the step time of the next plan.

finished run ──learn──▶ calibration.json ──pace──▶ Workload, and a decision that says so

Of GPUs only: what a CPU takes depends on what else it does. Kept by accelerator, method and stage class (ZeRO-3 fetches
parameters, which is another kind of slow). Memory is not corrected: its formulas are exact up to what they leave out,
and a wrong one should be found, not hidden.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from foretune.artifacts import Cluster, Decision, Plan, write_atomically

#: Runs that are remembered for a key; the median of their ratios counts.
REMEMBERED = 5
#: A ratio beyond this says that something else was running, not that the formula is off.
MOST = 5.0
#: Shorter runs are mostly warming up.
FEWEST_STEPS = 10


class Calibration:
    """Ratios of measured to predicted step time, as they stand in a file; an absent or damaged file holds none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ratios: dict[str, list[float]] = {}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            self._ratios = {str(key): [float(ratio) for ratio in ratios] for key, ratios in values["step_time"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass

    def factor(self, cluster: Cluster, method: str, zero_stage: int) -> float:
        """On the step time; 1 where nothing was measured, or where another machine is described."""
        ratios = self._ratios.get(_key(cluster, method, zero_stage), []) if _is_here(cluster) else []
        return median(ratios) if ratios else 1.0

    def pace(self, cluster: Cluster, method: str) -> tuple[float, float]:
        """The factors below stage 3 and at it."""
        return self.factor(cluster, method, 0), self.factor(cluster, method, 3)

    def decisions(self, cluster: Cluster, method: str, zero_stage: int) -> list[Decision]:
        """The line that says that a factor was used; none where it was not."""
        factor = self.factor(cluster, method, zero_stage)
        if factor == 1.0:
            return []
        runs = len(self._ratios[_key(cluster, method, zero_stage)])
        reason = f"step times are the formula's × {factor:.2f}, as {runs} earlier run(s) here took ({self.path})"
        return [Decision(field="calibration", value=round(factor, 3), reason=reason)]

    def learn(self, plan: Plan, *, step_seconds: float, steps: int) -> bool:
        """Add a run's measurement to the file. False if the run says too little."""
        cluster = plan.cluster
        if plan.replanned:
            return False
        used = next((float(one.value) for one in plan.decisions if one.field == "calibration"), 1.0)
        ratio = step_seconds * used / plan.predicted.step_seconds
        if not _is_here(cluster) or steps < FEWEST_STEPS or not 1 / MOST <= ratio <= MOST:
            return False
        key = _key(cluster, plan.method, plan.zero_stage)
        self._ratios[key] = [*self._ratios.get(key, []), round(ratio, 4)][-REMEMBERED:]
        write_atomically(self.path, json.dumps({"step_time": self._ratios}, indent=2) + "\n")
        return True


def _key(cluster: Cluster, method: str, zero_stage: int) -> str:
    return f"{cluster.accelerator.name} {method} {'ZeRO-3' if zero_stage == 3 else 'below ZeRO-3'}"


def _is_here(cluster: Cluster) -> bool:
    return cluster.probed and cluster.accelerator.kind == "cuda"
