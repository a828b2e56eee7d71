"""How long a row can be: full fine-tuning of one shape on one device, tokens per second and peak memory by length.

    python bench/long_rows.py [--shape 1.5B] [--lengths 32768,65536,131072] [--variants again,tiled] [--eager]
    python bench/long_rows.py --memory 77    # on a larger card: as far as torch gets with so much

One row, one document and one micro-batch a step: attention sees the whole length. ZeRO-1, 16-bit weights, fp32 sums and
master weights, every layer checkpointed, the loss in chunks. `again`: what a layer that is recomputed keeps leaves out
norms' outputs and gated products; `plain`: it has them; `kept`: as `again`, but attention's outputs are kept; `tiled`:
the MLPs in tiles of 4096 rows. Each variant is a process that tries the lengths in their order until one does not fit.
MFU counts matmuls and causal attention once; recomputation does not count.
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

LEARNING_RATE = 1e-5


def run(spec: dict[str, Any], answer: Path) -> None:
    """One variant in this process; the answer is written after every length."""
    import torch
    from contenders import Rows
    from shaped import bf16_config, build

    from foretune.distributed import rank_info
    from foretune.engine import open_group
    from foretune.errors import MachineFault
    from foretune.training.loop import train
    from foretune.training.state import TrainState

    device = open_group(rank_info())
    if spec["memory"] and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, spec["memory"] * 2**30 / whole), device)
    tile = spec["tile"] if spec["variant"] == "tiled" else 0
    engine, facts = build(spec["shape"], bf16_config(1, 1), device=device, learning_rate=LEARNING_RATE,
                          length=max(spec["lengths"]), compiled=not spec["eager"], mlp_rows=tile,
                          summed=not tile, recompute_pointwise=spec["variant"] in ("again", "kept"),
                          keep_attention=spec["variant"] == "kept")  # fmt: skip
    lengths: dict[int, dict[str, Any]] = {}
    for length in spec["lengths"]:
        times: list[float] = []
        losses: list[float] = []

        class Note:
            def after_step(self, report: Any, state: Any, times: Any = times, losses: Any = losses) -> None:
                times.append(report.seconds)
                losses.append(report.loss)

        rows = Rows({"seed": 0, "steps": spec["steps"], "rows": 1, "length": length}, 1)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            train(engine, rows, TrainState(), total_steps=spec["steps"],  # type: ignore[arg-type]
                  learning_rate=lambda step: LEARNING_RATE, hooks=[Note()])  # fmt: skip
        except (MachineFault, torch.OutOfMemoryError) as error:
            lengths[length] = {"error": str(error).splitlines()[0][:200]}
        else:
            seconds = statistics.median(times[1:])
            lengths[length] = {"step_seconds": times, "losses": losses, "tokens_per_second": length / seconds}
        if device.type == "cuda":
            lengths[length] |= {"peak_bytes": torch.cuda.max_memory_allocated(),
                                "peak_reserved_bytes": torch.cuda.max_memory_reserved()}  # fmt: skip
        print(length, lengths[length], flush=True)
        answer.write_text(json.dumps({**facts, "lengths": lengths}))
        if "error" in lengths[length]:
            return


def main() -> None:
    """Every variant in a process of its own."""
    if sys.argv[1:2] == ["--child"]:
        run(json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
        leave()
    from throughput import SHAPES, flops_per_token

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.5B", choices=tuple(SHAPES))
    parser.add_argument("--lengths", default="32768,65536,131072,196608,262144")
    parser.add_argument("--variants", default="plain,again,kept,tiled")
    parser.add_argument("--tile", type=int, default=4096, help="rows of an MLP's tile")
    parser.add_argument("--steps", type=int, default=2, help="of each length, the first of which is not counted")
    parser.add_argument("--eager", action="store_true", help="layers are not compiled")
    parser.add_argument("--memory", type=float, metavar="GIB", help="that torch may reserve, as on a smaller card")
    parser.add_argument("--minutes", type=float, default=3.0, help="each variant is cut off after this")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the device; an H100 has 989")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: bench/results)")
    asked = parser.parse_args()
    lengths = [int(length) for length in asked.lengths.split(",")]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for variant in asked.variants.split(","):
            spec = {"variant": variant, "shape": SHAPES[asked.shape], "lengths": lengths, "tile": asked.tile,
                    "steps": asked.steps, "eager": asked.eager, "memory": asked.memory}  # fmt: skip
            result = measured_in_a_child(__file__, spec, Path(work), name=variant, timeout_seconds=asked.minutes * 60)
            for length, one in result.get("lengths", {}).items():
                if "tokens_per_second" in one:
                    flops = flops_per_token(SHAPES[asked.shape], int(length), "full")
                    one["mfu"] = one["tokens_per_second"] * flops / (asked.peak_tflops * 1e12)
                print(variant, length, {key: value for key, value in one.items() if key != "losses"}, flush=True)
            if "error" in result:
                print(variant, result["error"], flush=True)
            results[variant] = result
    save_result(f"long-rows-{asked.shape}", {
        "machine": machine(), "shape": asked.shape, "tile": asked.tile, "memory_gib": asked.memory,
        "results": results,
    }, folder=asked.out)  # fmt: skip


if __name__ == "__main__":
    main()
