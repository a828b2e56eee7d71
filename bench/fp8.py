"""Linear maps in 8 bits beside bf16: tokens per second, and the loss of every step.

    python bench/fp8.py [--shape 3B] [--steps 30] [--rows 8]

The same random weights and rows of 4096 tokens, 4 a micro-batch, every layer checkpointed and compiled, ZeRO-1 with
fp32 sums and master weights; only the linear maps inside the layers differ. Each variant is a fresh process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import machine, measured_in_a_child, save_result

from foretune.distributed import leave

MICRO_BATCH, LEARNING_RATE, WARM_UP = 4, 1e-4, 3


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """One variant in this process."""
    import torch
    from contenders import Rows
    from shaped import bf16_config, build

    from foretune.distributed import rank_info
    from foretune.engine import open_group
    from foretune.training.loop import train
    from foretune.training.state import TrainState

    device = open_group(rank_info())
    config = bf16_config(MICRO_BATCH, spec["rows"] // MICRO_BATCH)
    engine, facts = build(spec["shape"], config, device=device, learning_rate=LEARNING_RATE,
                          float8=spec["variant"] == "fp8", summed=True)  # fmt: skip
    times: list[float] = []
    losses: list[float] = []

    class Note:
        def after_step(self, report: Any, state: Any) -> None:
            times.append(report.seconds)
            losses.append(report.loss)

    train(engine, Rows(spec, MICRO_BATCH), TrainState(), total_steps=spec["steps"],  # type: ignore[arg-type]
          learning_rate=lambda step: LEARNING_RATE, hooks=[Note()])  # fmt: skip
    seconds = statistics.median(times[WARM_UP:])
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {**facts, "step_seconds": times, "losses": losses, "peak_bytes": peak,
            "tokens_per_second": spec["rows"] * spec["length"] / seconds}  # fmt: skip


def main() -> None:
    """bf16, then fp8."""
    if sys.argv[1:2] == ["--child"]:
        Path(sys.argv[3]).write_text(json.dumps(run(json.loads(Path(sys.argv[2]).read_text()))))
        leave()
    from throughput import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="3B", choices=tuple(SHAPES))
    parser.add_argument("--rows", type=int, default=8, help="a step")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=3.0, help="each variant is cut off after this")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: bench/results)")
    asked = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for variant in ("bf16", "fp8"):
            spec = {"variant": variant, "shape": SHAPES[asked.shape], "rows": asked.rows, "length": asked.length,
                    "steps": asked.steps, "seed": 0}  # fmt: skip
            results[variant] = measured_in_a_child(
                __file__, spec, Path(work), name=variant, timeout_seconds=asked.minutes * 60
            )
            print(variant, json.dumps(results[variant])[:1500], flush=True)
    rates = [results[variant].get("tokens_per_second") for variant in ("fp8", "bf16")]
    ratio = rates[0] / rates[1] if all(rates) else None
    print(f"tokens per second, fp8 over bf16: {ratio}")
    save_result(f"fp8-{asked.shape}", {"machine": machine(), "shape": asked.shape, "rows": asked.rows,
                                       "results": results, "fp8_over_bf16": ratio}, folder=asked.out)  # fmt: skip


if __name__ == "__main__":
    main()
