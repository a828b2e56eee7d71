"""The optimizer in host memory: states that pass through the device, beside DeepSpeed's own partial offload.

    python bench/offload.py [--shape 7B] [--contenders foretune,deepspeed] [--share 0.85] [--steps 4]

As planned for one card of 80 GB:

    python bench/offload.py --contenders foretune --micro-batch 1 --checkpointed 0 --again --chunk 4096 --share 0.83
    python bench/offload.py --contenders foretune-8bit --micro-batch 1 --checkpointed 0 --again --chunk 4096

The same random weights, rows of tokens, loss and packed attention for both; 16 rows of 4096 tokens a step, 4 at a time
and every layer checkpointed where nothing else is said. `foretune`: ZeRO-1, fp32 sums on the device, compiled layers,
`foretune.engine.states.streaming`.
`foretune-8bit`: the same with nothing on the host: Adam's moments in 8 bits, no master weights: other numerics
(`foretune.engine.states.eight_bits`).
`deepspeed`: ZeRO-3 with `offload_optimizer.ratio` 0.7 and CPUAdam on all cores, bf16 sums, everything else as DeepSpeed
has it but for the share on the device, which the fused kernel steps.

Out: tokens per second, forward, backward and optimizer step apart, peak memory of the device while building and in
training, of the host, losses.

Without a GPU a tiny shape in bf16 shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import machine, measured_in_a_child, save_result

from foretune.distributed import leave

ROWS = 16  # of a step
RATIO = 0.7  # of DeepSpeed's partial offload: what the host's 125 GiB allow
LEARNING_RATE = 1e-5


def engine_config(contender: str, micro_batch: int) -> dict[str, Any]:
    """DeepSpeed's section of a contender."""
    from shaped import bf16_config

    config = bf16_config(micro_batch, ROWS // micro_batch)
    if contender != "deepspeed":
        return config
    offload = {"device": "cpu", "pin_memory": True, "ratio": RATIO}
    zero = {"stage": 3, "offload_optimizer": offload, "sub_group_size": 100_000_000}
    kept = {key: value for key, value in config.items() if key not in ("data_types", "communication_data_type")}
    return kept | {"zero_optimization": zero, "bf16": {"enabled": True}}


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """One contender in this process."""
    from contenders import Rows
    from shaped import build

    from foretune.distributed import rank_info
    from foretune.engine import close_group, open_group
    from foretune.training.loop import train
    from foretune.training.state import TrainState

    ours, eight_bits = spec["contender"] != "deepspeed", spec["contender"] == "foretune-8bit"
    began = time.monotonic()
    device = open_group(rank_info())
    engine, facts = build(
        spec["shape"], engine_config(spec["contender"], spec["micro_batch"]), device=device,
        learning_rate=LEARNING_RATE, compiled=ours, checkpointed=spec["checkpointed"], chunk_tokens=spec["chunk"],
        deepspeed_ratio=0.0 if ours else RATIO, summed=ours, eight_bits=eight_bits,
        streamed_share=spec["share"] if ours and not eight_bits else 0.0, recompute_pointwise=spec["again"],
    )  # fmt: skip
    built = time.monotonic() - began
    facts |= _device_peaks(device, "building_")
    reports: list[Any] = []

    class Note:
        def after_step(self, report: Any, state: Any) -> None:
            reports.append(report)
            print(report.step, round(report.seconds, 3), report.seconds_by_phase, report.loss, flush=True)

    train(engine, Rows(spec, spec["micro_batch"]), TrainState(), total_steps=spec["steps"],  # type: ignore[arg-type]
          learning_rate=lambda step: LEARNING_RATE, hooks=[Note()])  # fmt: skip
    figures = {
        "build_seconds": built,
        "step_seconds": [report.seconds for report in reports],
        "phases": [report.seconds_by_phase for report in reports],
        "losses": [report.loss for report in reports],
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **facts,
        **_device_peaks(device),
    }
    close_group()
    return figures


def _device_peaks(device: Any, phase: str = "") -> dict[str, int]:
    """Peaks of torch's allocator since the last call."""
    import torch

    if device.type != "cuda":
        return {}
    peaks = {f"{phase}peak_bytes": torch.cuda.max_memory_allocated(),
             f"{phase}peak_reserved_bytes": torch.cuda.max_memory_reserved()}  # fmt: skip
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peaks


def measure(spec: dict[str, Any], folder: Path, timeout_seconds: float) -> dict[str, Any]:
    """One contender in a process of its own."""
    cores = str(len(os.sched_getaffinity(0)))
    result = measured_in_a_child(
        __file__, spec, folder, name=spec["contender"], timeout_seconds=timeout_seconds, OMP_NUM_THREADS=cores
    )
    if "error" in result:
        return result
    settled = slice(2, None) if len(result["step_seconds"]) > 2 else slice(None)  # compiling, page-locking
    seconds = statistics.median(result["step_seconds"][settled])
    phases = result["phases"][settled]
    names = {name for one in phases for name in one}
    return result | {
        "median_step_seconds": seconds,
        "median_phase_seconds": {name: statistics.median(one.get(name, 0.0) for one in phases) for name in names},
        "tokens_per_second": spec["rows"] * spec["length"] / seconds,
    }


def main() -> None:
    """Measure every contender; ours first, since DeepSpeed's compiles its kernel and initialises for minutes."""
    if sys.argv[1:2] == ["--child"]:
        result = run(json.loads(Path(sys.argv[2]).read_text()))
        Path(sys.argv[3]).write_text(json.dumps(result))
        leave()
    from throughput import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7B", choices=tuple(SHAPES))
    parser.add_argument("--contenders", default="foretune,deepspeed")
    parser.add_argument("--share", type=float, default=0.85, help="of ours, in host memory")
    parser.add_argument("--micro-batch", type=int, default=4, choices=(1, 2, 4, 8, 16))
    parser.add_argument("--checkpointed", type=int, help="layers that recompute themselves (default: all)")
    parser.add_argument("--again", action="store_true", help="norms' outputs and gated products are made again")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a piece of the loss")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=5.0, help="each contender is cut off after this")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: bench/results)")
    asked = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for contender in asked.contenders.split(","):
            spec = {"contender": contender, "shape": SHAPES[asked.shape], "share": asked.share, "steps": asked.steps,
                    "micro_batch": asked.micro_batch, "checkpointed": asked.checkpointed, "chunk": asked.chunk,
                    "again": asked.again, "rows": ROWS, "length": asked.length, "seed": 0}  # fmt: skip
            results[contender] = measure(spec, Path(work), asked.minutes * 60)
            print(contender, json.dumps(results[contender], indent=1), flush=True)
            save_result(f"offload-{asked.shape}", {
                "machine": machine(), "shape": asked.shape, "rows": spec["rows"], "length": asked.length,
                "share": asked.share, "micro_batch": asked.micro_batch, "checkpointed": asked.checkpointed,
                "again": asked.again, "chunk": asked.chunk, "deepspeed_ratio": RATIO, "results": results,
            }, folder=asked.out)  # fmt: skip


if __name__ == "__main__":
    main()
