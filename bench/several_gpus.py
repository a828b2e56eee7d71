"""Training as it plans itself on several GPUs of one machine: tokens a second and rank 0's memory, beside the plan's.

    python bench/several_gpus.py [--shape 1.5B] [--gpus 2] [--rows 32] [--length 4096] [--set plan.zero_stage=3]

`foretune train` of a long run on random weights of a shape (of `throughput.py`), killed once it has done a few steps,
before it saves. `--rows` are of each GPU, so a global batch grows with their number. The median step counts, after
three in which kernels are compiled and memory is made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import machine, save_result
from startup import model_with_tokenizer, wait_for_ranks
from throughput import SHAPES

from foretune.artifacts import RunFolder
from foretune.events import EventKind, read_events

WARM_UP = 3
#: Steps that a plan is made for: compiling pays.
PLANNED_STEPS = 3000
#: What of a plan is told.
CHOICES = ("zero_stage", "micro_batch_size_per_gpu", "gradient_accumulation_steps", "checkpointed_layers",
           "loss_chunk_tokens", "compile_layers", "attention", "sum_in_matmul", "fused_mlp", "fused_qkv")  # fmt: skip


def summary(plan: dict[str, Any], events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run planned and what it did, of its plan.json and its journal."""
    steps = [event for event in events if event["kind"] == EventKind.STEP]
    settled = steps[WARM_UP:]
    seconds = statistics.median(step["seconds"] for step in settled)
    predicted = plan["predicted"]
    return {
        "gpus": plan["world_size"],
        "plan": {name: plan[name] for name in CHOICES},
        "step_seconds": [round(step["seconds"], 3) for step in steps],
        "losses": [step["loss"] for step in steps],
        "tokens_per_second": round(statistics.mean(step["tokens"] for step in settled) / seconds),
        "seconds": seconds,
        "predicted_seconds": predicted["step_seconds"],
        "peak_bytes": max(step["memory_bytes"] for step in steps),
        "predicted_bytes": predicted["gpu_memory_bytes"],
    }


def trained(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Train until enough steps are done; RuntimeError with its last words if it ends before."""
    rows, run = folder / "rows.jsonl", RunFolder(folder / "run")
    model = model_with_tokenizer(asked.shape, folder / "model")
    texts = (f"Once upon a time {number} " * (asked.length // 10) for number in range(1000))
    rows.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    sets = [f"train.max_length={asked.length}", f"train.global_batch_size={asked.rows * asked.gpus}",
            f"train.max_steps={PLANNED_STEPS}", "train.learning_rate=1e-5", "evaluate.validation=0",
            *asked.set]  # fmt: skip
    command = [sys.executable, "-m", "foretune", "train", "--model", str(model), "--data", str(rows),
               "--out", str(run.path), "--nproc", str(asked.gpus), "--quiet",
               *(part for one in sets for part in ("--set", one))]  # fmt: skip

    def steps_done() -> int:
        return sum(event["kind"] == EventKind.STEP for event in read_events(run.events))

    end = time.monotonic() + asked.minutes * 60
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and time.monotonic() < end and steps_done() < asked.steps:
                time.sleep(0.3)
        finally:
            process.kill()  # its ranks die with it
            process.wait()
        wait_for_ranks(run.path)
        if steps_done() < asked.steps:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {said.read()[-3000:]}")
    return summary(json.loads(run.plan.read_text()), list(read_events(run.events)))


def main() -> None:
    """One run; its figures and a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.5B", choices=tuple(SHAPES))
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32, help="of a global batch, for each GPU")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=5.0, help="it is cut off after this")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of foretune's")
    parser.add_argument("--work", type=Path, help="where the model is made (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: bench/results)")
    asked = parser.parse_args()
    if asked.steps <= WARM_UP:
        parser.error(f"--steps: the first {WARM_UP} do not count")
    with tempfile.TemporaryDirectory(dir=asked.work) as work:
        run = trained(Path(work), asked)
    print(json.dumps(run, indent=1))
    settings = "".join(f"-{one.removeprefix('plan.').replace('=', '-')}" for one in asked.set)
    wanted = {name: getattr(asked, name) for name in ("shape", "gpus", "rows", "length", "steps", "set")}
    save_result(
        f"{asked.gpus}-gpus-{asked.shape}{settings}",
        {"machine": machine(), "asked": wanted, "run": run},
        folder=asked.out,
    )


if __name__ == "__main__":
    main()
