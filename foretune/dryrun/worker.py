"""The child process of a dry run: builds what training builds, on fake tensors, and takes two steps.

    python -m foretune.dryrun.worker FOLDER

In: FOLDER with plan.json, config.yaml, model/config.json.  Out: FOLDER/measured.json: bytes alive after the engine is
built and after the second step (the first that has the optimizer's states), and the peak of every phase.

A process of its own, because it patches DeepSpeed and torch for good and opens a process group that is none.
Three patches are needed, each for something that fake tensors cannot do: read values (`StorageTracker`), move a module
(`to` copies through real memory), and compare sizes among ranks that do not exist.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from foretune.artifacts import Plan, RunFolder, write_atomically
from foretune.config import load_config
from foretune.distributed import RankInfo, leave
from foretune.dryrun.storage import StorageTracker

RESULT = "measured.json"


def main(folder: Path) -> None:
    """Run and write the result."""
    run = RunFolder(folder)
    plan = Plan.read(run.plan)
    device = _open_fake_group(plan.world_size)
    _patch(plan)
    from torch._subclasses.fake_tensor import FakeTensorMode

    from foretune.training.build import build_engine

    rank = RankInfo(rank=0, local_rank=0, world_size=plan.world_size, local_world_size=plan.cluster.devices_per_node)
    # An engine is built from these alone: there is no data, no journal, and nobody to tell anything.
    assignment: Any = SimpleNamespace(
        run=run, config=load_config(run.config), plan=plan, rank=rank, tell=lambda *_, **__: None
    )
    tracker = StorageTracker()
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        with tracker.phase("initialisation"):
            engine, _ = build_engine(assignment, device)
        built = tracker.live_bytes
        for _ in range(2):
            _step(engine, plan, tracker)
        result = {"built_bytes": built, "resident_bytes": tracker.live_bytes, "peaks": tracker.peaks}
    write_atomically(folder / RESULT, json.dumps(result))


def _step(engine: Any, plan: Plan, tracker: StorageTracker) -> None:
    import torch

    rows, length = plan.micro_batch_size_per_gpu, plan.max_length
    for _ in range(min(2, plan.gradient_accumulation_steps)):
        with tracker.phase("forward"):
            ids = torch.zeros(rows, length, dtype=torch.long)
            positions = torch.arange(length)[None].expand(rows, -1)
            every = torch.arange(rows * length)
            loss = engine(input_ids=ids, position_ids=positions, shift_labels=ids, target_index=every)
        with tracker.phase("backward"):
            engine.backward(loss)
        del loss
    with tracker.phase("step"):
        engine.step(plan.learning_rate)


def _open_fake_group(world_size: int) -> Any:
    """Rank 0 of a group in which collectives return at once; the device is the CPU's, whatever the plan is for."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size))  # DeepSpeed reads these itself
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from foretune.engine import without_compiler

    without_compiler()
    torch.distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    deepspeed.init_distributed(dist_backend="fake", verbose=False)
    assert get_accelerator().device_name() in ("cpu", "cuda")
    get_accelerator().is_fp16_supported = lambda: True  # shapes can be of any type
    return torch.device("cpu")


def _patch(plan: Plan) -> None:
    import deepspeed.runtime.zero.stage3  # noqa: F401  (loads every module that holds the function patched below)
    import torch

    def cast_only(self: torch.nn.Module, *given: Any, **named: Any) -> torch.nn.Module:
        dtype = next((value for value in (*given, *named.values()) if isinstance(value, torch.dtype)), None)
        for parameter in self.parameters() if dtype is not None else ():
            parameter.data = parameter.data.to(dtype)
        return self

    if plan.cluster.accelerator.kind != "cpu":  # what the engine does on a CPU only would be done here too
        from foretune.engine.reduction import ReductionAtStep

        ReductionAtStep.applies = staticmethod(lambda engine: False)  # type: ignore[method-assign]
    torch.nn.Module.to = cast_only  # type: ignore[method-assign, assignment]
    for name, module in list(sys.modules.items()):
        if name.startswith("deepspeed") and hasattr(module, "assert_ints_same_as_other_ranks"):
            setattr(module, "assert_ints_same_as_other_ranks", lambda *_, **__: None)  # noqa: B010 (no such attribute)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
