r"""Training throughput: ours and what people would use instead, in one run on one machine.

    python bench/throughput.py [--shapes 0.5B,1.5B,3B,7B] [--method full|lora] [--contenders …] [--minutes 25]
    python bench/throughput.py --shapes 0.5B --accumulation 1 --steps 50    # do the losses agree?
    python bench/throughput.py --method lora --shapes 7B --accumulation 1 --checkpointed --contenders foretune,trl \
        --memory 22.7                                                       # and how fast within the peer's memory?

Every contender runs in a fresh process, on the same random weights, rows of tokens, global batch, sequence length and
learning rate. Steps are timed between device synchronisations; the median counts, after a warm-up. A contender that
fails is recorded with its error.

MFU is model FLOP over the device's dense 16-bit peak: per token 6 x parameters that are multiplied (layers and output
head; 4 x where they are frozen, 6 x adapters), plus 6 x layers x width x length for causal attention (half the square;
forward 2, backward 4). Recomputation does not count.

Out: a table, and JSON with date, versions, device, step times, losses and peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measuring import machine, save_result

#: Qwen2.5's shapes, and one for a dry run without a GPU.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
           "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
#: name → what it is. `contenders.py` has their code.
CONTENDERS = {
    "foretune": "foretune, everything as it plans by itself",
    "foretune-same": "foretune with the peers' micro-batch and checkpointing",
    "foretune-bf16": "the same, gradients summed in bf16 as the peers' are",
    "torch": "foretune's model in a plain torch loop, no DeepSpeed; micro-batch and checkpointing of foretune-same",
    "trl": "TRL + Liger: bf16 weights and Adam states, no fp32 master",
    "trl-zero2": "TRL + Liger + DeepSpeed ZeRO-2: fp32 master weights, bf16 sums",
    "trl-zero3": "TRL + Liger + DeepSpeed ZeRO-3: fp32 master weights, bf16 sums",
    "unsloth": "Unsloth",
}
LORA_RANK = 16


@dataclass(frozen=True)
class Spec:
    """One measurement, as the child process reads it."""

    contender: str
    shape: str
    method: str
    model: str  # folder
    rows: int  # a step
    micro_batch: int
    length: int
    checkpointed: bool
    steps: int
    warm_up: int
    learning_rate: float
    seed: int
    settings: tuple[str, ...] = ()  # of foretune alone: KEY=VALUE
    memory_gib: float | None = None  # that foretune's plan may take; None: the device's
    profile: bool = False  # where the device's time goes in the last step, foretune alone


def matmul_parameters(shape: dict[str, Any]) -> tuple[int, int]:
    """(parameters of the layers' linears and the head, parameters of LoRA on all linears)."""
    h, i, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    linears = [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]
    plain = layers * sum(a * b for a, b in linears) + h * shape["vocab_size"]
    return plain, layers * sum(LORA_RANK * (a + b) for a, b in linears)


def flops_per_token(shape: dict[str, Any], length: int, method: str) -> float:
    """Model FLOP of a token, forward and backward; see the head of this file."""
    plain, adapters = matmul_parameters(shape)
    attention = 6 * shape["num_hidden_layers"] * shape["hidden_size"] * length
    return (6 * plain if method == "full" else 4 * plain + 6 * adapters) + attention


def measure(spec: Spec, folder: Path, timeout_seconds: float) -> dict[str, Any]:
    """Run one contender in a process of its own."""
    file, answer, log = folder / "spec.json", folder / "result.json", folder / f"{spec.contender}-{spec.shape}.log"
    file.write_text(json.dumps(asdict(spec)))
    answer.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("contenders.py")), str(file), str(answer)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # fmt: skip
    start = time.monotonic()
    with log.open("w") as out:
        try:
            code = subprocess.run(command, stdout=out, stderr=out, env=environment, timeout=timeout_seconds).returncode
        except subprocess.TimeoutExpired:
            code = -1
    if code == 0 and answer.is_file():
        result: dict[str, Any] = json.loads(answer.read_text())
    else:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        result = {"error": f"exit {code}: " + (" | ".join(said[-4:])[-600:] if said else "no output")}
    return result | {"process_seconds": round(time.monotonic() - start, 1)}


def summarise(spec: Spec, result: dict[str, Any], peak_flops: float) -> dict[str, Any]:
    """Median step time, tokens per second and MFU from the step times."""
    times = result.get("step_seconds", [])[spec.warm_up :]
    if not times:
        return result
    median = statistics.median(times)
    tokens = spec.rows * spec.length / median
    flops = flops_per_token(SHAPES[spec.shape], spec.length, spec.method)
    return result | {
        "median_step_seconds": median,
        "tokens_per_second": tokens,
        "flops_per_token": flops,
        "mfu": tokens * flops / peak_flops,
    }


def row_of(spec: Spec, result: dict[str, Any]) -> str:
    """One line of the table."""
    head = f"{spec.shape:5} {spec.method:5} {spec.contender:14}"
    if "median_step_seconds" not in result:
        return f"{head} {result.get('error', 'no steps')[-150:]}"
    peak = result.get("peak_bytes", 0) / 2**30
    last = result["losses"][-1] if result.get("losses") else float("nan")
    return (
        f"{head} {result['tokens_per_second']:10,.0f} tok/s  MFU {result['mfu']:6.1%}  "
        f"step {result['median_step_seconds']:8.3f} s  peak {peak:5.1f} GiB  last loss {last:.4f}"
    )


def make_model(shape: str, folder: Path, seed: int) -> None:
    """Random weights of a shape as a Hugging Face folder, with a tokenizer of words for those who insist on one."""
    command = [sys.executable, str(Path(__file__).with_name("contenders.py")), "--make", str(folder), str(seed)]
    subprocess.run(command, input=json.dumps(SHAPES[shape]), text=True, check=True)


def main() -> None:
    """Measure every contender on every shape until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.5B,1.5B,3B")
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--minutes", type=float, default=25.0, help="all of it is cut off after this")
    parser.add_argument("--minutes-each", type=float, default=5.0, help="a contender is cut off after this")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=4, help="rows of the peers' forward pass")
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--checkpointed", action="store_true", help="peers recompute every layer")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--loss-steps", type=int, default=0, help="first compare this many losses, at accumulation 1")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the device; an H100 has 989")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of foretune's")
    parser.add_argument("--memory", type=float, metavar="GIB", help="that foretune's plan may take, as a peer's peak")
    parser.add_argument("--profile", action="store_true", help="say where foretune's last step goes, by kernel")
    parser.add_argument("--work", type=Path, help="where models are made (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: bench/results)")
    asked = parser.parse_args()
    started = time.monotonic()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=asked.work) as work:
        folder = Path(work)
        for number, shape in enumerate(asked.shapes.split(",")):
            make_model(shape, folder / shape, asked.seed)
            for contender in asked.contenders.split(","):
                spec = Spec(
                    contender, shape, asked.method, str(folder / shape), asked.micro_batch * asked.accumulation,
                    asked.micro_batch, asked.length, asked.checkpointed, asked.steps, asked.warm_up,
                    asked.learning_rate, asked.seed, tuple(asked.set), asked.memory, asked.profile,
                )  # fmt: skip
                left = asked.minutes * 60 - (time.monotonic() - started)
                if left < 30:
                    results.append({"spec": asdict(spec), "error": "no time was left"})
                    continue
                limit = min(left, asked.minutes_each * 60)
                result = summarise(spec, measure(spec, folder, limit), asked.peak_tflops * 1e12)
                results.append({"spec": asdict(spec), **result})
                print(row_of(spec, result), flush=True)
                for kind, seconds in result.get("kernels", {}).get("by_kind", {}).items():
                    print(f"      {kind:20} {1e3 * seconds:9.1f} ms", flush=True)
                if asked.loss_steps and number == 0 and "error" not in result:
                    long = replace(spec, rows=asked.micro_batch, steps=asked.loss_steps, warm_up=1)
                    left = asked.minutes * 60 - (time.monotonic() - started)
                    losses = measure(long, folder, min(max(30.0, left), asked.minutes_each * 60))
                    results.append({"spec": asdict(long), "comparison": "losses", **losses})
                save(asked, results)
    save(asked, results)
    for step, differences in loss_differences(results).items():
        print(f"losses from the median of all, {step}: {differences}")


def save(asked: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Write what is known so far: a run that is cut short leaves its figures."""
    name = f"throughput-{asked.method}-{asked.shapes.replace(',', '-')}-accumulation-{asked.accumulation}"
    name += f"-within-{asked.memory:g}" if asked.memory else ""
    name += "-checkpointed" * asked.checkpointed + "-profile" * asked.profile
    values = {
        "machine": machine(),
        "peak_tflops": asked.peak_tflops,
        "contenders": CONTENDERS,
        "loss_differences": loss_differences(results),
        "results": results,
    }
    save_result(name, values, folder=asked.out)


def loss_differences(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Largest difference of each contender's losses from the median of all, where they trained on the same rows."""
    curves: dict[str, dict[str, list[float]]] = {}
    for one in results:
        if one.get("losses"):
            spec = one["spec"]
            rows = f"{spec['shape']}, {spec['steps']} steps of {spec['rows']} rows"
            curves.setdefault(rows, {})[spec["contender"]] = one["losses"]
    differences = {}
    for rows, group in curves.items():
        middle = [statistics.median(losses) for losses in zip(*group.values(), strict=False)]
        if len(group) > 1:
            differences[rows] = {
                name: max(abs(loss - usual) for loss, usual in zip(curve, middle, strict=False))
                for name, curve in group.items()
            }
    return differences


if __name__ == "__main__":
    main()
