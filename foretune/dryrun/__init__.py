"""The real DeepSpeed engine on fake tensors: confirms a plan without a GPU, for any number of ranks.

Plan, Config ──child process──▶ bytes alive in the engine ──against the closed forms──▶ `DryRun`

Everything that training builds is built (model, adapters, loss, optimizer, engine) and takes two optimizer steps, but
tensors have shapes only, and collectives among ranks that do not exist return at once. What is confirmed are the model
states: parameters, gradients, optimizer, and DeepSpeed's buffers. Device and host are counted together, since there is
no device: offloading moves bytes, it makes none. Kernels, their workspaces and the allocator are not in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretune.artifacts import Plan, RunFolder, write_atomically
from foretune.config import Config, to_yaml
from foretune.errors import UserError
from foretune.planning.layout import work_and_strategy
from foretune.planning.planner import shape_for
from foretune.planning.predict.memory import standing_bytes
from foretune.planning.shapes import known_config

#: Model states further apart than this are a mistake in the closed forms or in the dry run.
TOLERANCE = 0.03
_TIMEOUT_SECONDS = 600
_RESULT = "measured.json"


@dataclass(frozen=True)
class DryRun:
    """What the closed forms say against what the engine holds. Bytes of one rank, device and host together."""

    predicted_bytes: int
    engine_bytes: int
    peaks: dict[str, int]
    seconds: float

    @property
    def difference(self) -> float:
        """Of the engine's, relative to the prediction."""
        return self.engine_bytes / self.predicted_bytes - 1.0

    @property
    def agrees(self) -> bool:
        return abs(self.difference) <= TOLERANCE

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        figures = {"predicted_bytes": self.predicted_bytes, "engine_bytes": self.engine_bytes, "peaks": self.peaks}
        return {**figures, "difference": self.difference, "agrees": self.agrees, "seconds": self.seconds}


def dry_run(plan: Plan, config: Config) -> DryRun:
    """Let the engine of `plan` be built and take two steps on fake tensors.

    Raises:
        UserError: the plan's model cannot be built.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="foretune-dry-run-") as name:
        folder = Path(name)
        lay_out(folder, plan, config)
        command = [sys.executable, "-m", "foretune.dryrun.worker", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, cwd=folder)
        if not (folder / _RESULT).is_file():
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
            raise UserError("--dry-run", plan.model, f"the engine could not be built: {last}", "plan without --dry-run")
        return read(folder, plan, config, seconds=time.monotonic() - start)


def read(folder: Path, plan: Plan, config: Config, *, seconds: float) -> DryRun:
    """What the child process left in `folder`, beside what the closed forms say."""
    work, strategy = work_and_strategy(config, plan, shape_for(plan.model))
    measured = json.loads((folder / _RESULT).read_text())
    predicted = standing_bytes(work, strategy, plan.cluster)
    return DryRun(predicted, measured["resident_bytes"], measured["peaks"], seconds)


def lay_out(folder: Path, plan: Plan, config: Config) -> None:
    """The plan as the child builds it: random weights of the same shape, on a CPU, offloading whole or not at all."""
    run = RunFolder(folder)
    model = Path(plan.model) if Path(plan.model).is_dir() else run.model
    if model == run.model:
        keys = known_config(plan.model)
        assert keys is not None, "a plan was made for it"
        write_atomically(model / "config.json", json.dumps(keys))
    values = json.loads(json.dumps(plan.deepspeed_config))
    zero = values["zero_optimization"]
    for section in ("offload_optimizer", "offload_param"):
        if section in zero:
            zero[section] = {"device": "cpu", "pin_memory": False}
    # A part would need a kernel that can't run on fake tensors; what is streamed is the same states, on the device.
    whole = float(plan.offload_optimizer > 0 and not plan.streams_optimizer)
    # Nor can 8-bit maps: the states are those of bf16.
    changes = {"model": str(model), "deepspeed_config": values, "offload_optimizer": whole, "fp8": False}
    plan.model_copy(update=changes).write(run.plan)
    write_atomically(run.config, to_yaml(config.model_copy(update={"from_scratch": True})))
