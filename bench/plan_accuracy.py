"""How true plans are: predicted against measured, on this machine's GPU.

    python bench/plan_accuracy.py [--minutes 25] [--half fresh] [--only WORD] [--out FILE] [--tiny]
    python bench/plan_accuracy.py --again FILE          predicts anew what a file measured, anywhere

Every configuration runs in a process of its own, forked from one that has imported everything: random weights of a
public shape, made on the device; random tokens, two documents a row; the engine that training builds, optimizer steps
for three seconds, three at least, of which the fastest of the last half counts (ZeRO-3 learns the order of the modules
in the second; the first results had three steps each). Compared are the peak of torch's allocator (allocated,
reserved), the process's host memory where something is offloaded, and the time of a step.

Half of the configurations are for calibrating the constants; the other half judges them, and holds whole architectures
(Llama, Qwen3) and lengths (8192, 16384) that the first has not. A third list, `fresh`, was written down after the
structure of the formulas was last changed, with architectures (GPT-NeoX, Gemma 2), a length (32768) and a layout (the
streamed optimizer) that neither has; it judges what has seen the second.

In: nothing but the GPU; no network. Out: one JSON file, written after every configuration, failures included. The same
command goes on where it ended. `--tiny` runs a few small shapes anywhere, to try the bench itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measuring import RESULTS, assignment_of, machine

from foretune.distributed import leave

GIB = 2**30
FEWEST_STEPS, MOST_STEPS, STEP_SECONDS = 3, 12, 3.0
TIMEOUT_SECONDS = 300


HALVES = ("calibration", "judged", "fresh")


@dataclass(frozen=True)
class Case:
    """One configuration. `layers` is the share that is checkpointed, `offload` that of the optimizer."""

    half: str  # calibration | judged | fresh
    model: str
    length: int
    micro: int
    stage: int
    method: str = "full"
    accumulation: int = 1
    layers: float = 0.0
    offload: float = 0.0
    compile: bool = False
    sums: str = "fp32"
    attention: str = "auto"
    streamed: bool = False
    sum_in_matmul: bool = True
    recompute_pointwise: bool = True
    keep_attention: bool = True

    @property
    def name(self) -> str:
        """Unique, for people."""
        parts = [self.model, self.method, f"{self.micro}x{self.length}", f"ZeRO-{self.stage}"]
        parts += [f"x{self.accumulation}"] if self.accumulation > 1 else []
        parts += [f"layers {self.layers:g}"] if self.layers else []
        parts += [f"{'streamed' if self.streamed else 'offload'} {self.offload:g}"] if self.offload else []
        parts += ["compiled"] if self.compile else []
        parts += [f"sums {self.sums}"] if self.sums != "fp32" else []
        parts += [self.attention] if self.attention != "auto" else []
        return " ".join(parts)


def _calibration() -> list[Case]:
    small, middle, large = "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B"

    def case(*given: Any, **more: Any) -> Case:
        return Case("calibration", *given, **more)

    return [
        *(case(small, 1024, 16, stage) for stage in (1, 2, 3)),
        case(small, 1024, 16, 0, sums="bf16"),
        case(small, 1024, 16, 1, sums="bf16"),
        case(small, 1024, 16, 1, attention="sdpa"),
        case(small, 1024, 16, 1, compile=True),
        case(small, 512, 16, 2, accumulation=8, compile=True),
        case(small, 2048, 8, 1, layers=0.5),
        case(small, 2048, 8, 1, method="lora"),
        case(small, 2048, 8, 3, method="lora"),
        case("gpt2", 1024, 16, 1),
        case("gpt2", 512, 8, 2, accumulation=8),
        case("gpt2", 1024, 16, 3, layers=1.0),
        case("gpt2-xl", 1024, 4, 1),
        case("gpt2-xl", 1024, 8, 2, layers=1.0),
        case("gpt2-xl", 1024, 8, 1, method="lora"),
        case(middle, 2048, 4, 1),
        case(middle, 2048, 4, 3, layers=0.5),
        case(middle, 4096, 4, 2, layers=1.0, accumulation=8),
        case(middle, 4096, 2, 1, compile=True),
        case(middle, 2048, 4, 2, offload=1.0),
        case(middle, 2048, 4, 3, offload=0.5),
        case(middle, 4096, 2, 1, method="lora", layers=0.5, compile=True),
        case(middle, 4096, 4, 2, layers=0.5, accumulation=8, compile=True),
        case(large, 1024, 2, 1, method="lora"),
        case(large, 4096, 4, 1, method="lora", layers=1.0),
    ]


def _judged() -> list[Case]:
    llama, small, middle = "Llama-3.2-1B", "Qwen3-0.6B", "Qwen3-1.7B"

    def case(*given: Any, **more: Any) -> Case:
        return Case("judged", *given, **more)

    return [
        *(case(llama, 1024, 8, stage) for stage in (1, 2, 3)),
        case(llama, 8192, 1, 1),
        case(llama, 8192, 2, 2, layers=0.5, compile=True),
        case(llama, 16384, 1, 1, layers=1.0),
        case(llama, 2048, 4, 1, accumulation=8),
        case(llama, 4096, 4, 1, compile=True),
        case(llama, 2048, 4, 2, offload=1.0),
        case(llama, 2048, 8, 1, method="lora", compile=True),
        case("SmolLM2-135M", 512, 16, 1),
        case("SmolLM2-135M", 8192, 2, 3),
        case("SmolLM2-360M", 2048, 8, 2, accumulation=8),
        *(case(small, 2048, 4, stage) for stage in (1, 2, 3)),
        case(small, 16384, 1, 1, layers=0.5),
        case(small, 8192, 2, 1, method="lora"),
        case(small, 1024, 16, 1, compile=True),
        case(middle, 4096, 2, 1, compile=True),
        case(middle, 8192, 1, 3, layers=1.0),
        case(middle, 2048, 4, 3, offload=0.5),
        case("Llama-3.2-3B", 2048, 2, 1),
        case("Llama-3.2-3B", 4096, 2, 2, layers=1.0),
        case("Llama-3.1-8B", 2048, 2, 1, method="lora"),
        case("Llama-3.1-8B", 8192, 1, 1, method="lora", layers=1.0),
        case("Qwen3-8B", 4096, 1, 3, method="lora", layers=0.5),
        case("gpt2-medium", 1024, 8, 1),
    ]


def _fresh() -> list[Case]:
    """About three minutes: the partial offload compiles its optimizer for one of them."""

    def case(*given: Any, **more: Any) -> Case:
        return Case("fresh", *given, **more)

    return [
        case("pythia-1.4b", 2048, 4, 1),
        case("gemma-2-2b", 2048, 1, 1, layers=1.0),
        case("SmolLM2-1.7B", 2048, 4, 2, accumulation=4),
        case("gpt2-large", 1024, 8, 3),
        case("Qwen2.5-3B", 32768, 1, 1, layers=1.0),
        case("Qwen3-4B", 4096, 2, 1, method="lora", layers=0.5),
        case("Qwen2.5-3B", 4096, 1, 1, accumulation=4, offload=0.8, compile=True, streamed=True),
        case("Llama-3.2-3B", 2048, 2, 3, accumulation=2, layers=1.0, offload=0.6),
    ]


def _tiny() -> list[Case]:
    return [
        Case("calibration", "pythia-70m", 64, 2, 1, accumulation=2),
        Case("judged", "pythia-70m", 64, 2, 3, layers=0.5),
        Case("judged", "pythia-70m", 64, 2, 2, method="lora"),
        Case("fresh", "pythia-70m", 64, 2, 1),
    ]


def main() -> int:
    """Run what is left, write after each, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--half", choices=HALVES, help="these configurations alone")
    parser.add_argument("--only", help="configurations whose name holds this")
    parser.add_argument("--out", type=Path, help="result to write, or to go on with")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--again", type=Path, metavar="FILE", help="predict anew, with the constants of today")
    given = parser.parse_args()
    if given.again is not None:
        return _again(given.again)
    out = given.out or RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-plan-accuracy.json"
    known = json.loads(out.read_text()) if out.is_file() else {"results": []}
    done = {result["name"] for result in known["results"]}
    cases = _tiny() if given.tiny else [*_interleaved(_calibration(), _judged()), *_fresh()]
    cases.sort(key=lambda case: 0 < case.offload < 1)  # last: they compile an optimizer first, for up to a minute
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as every launch has it
    _import_all()
    ends = time.monotonic() + 60 * given.minutes
    for case in cases:
        unwanted = (given.only and given.only not in case.name) or (given.half and given.half != case.half)
        if case.name in done or unwanted:
            continue
        if time.monotonic() > ends:
            print("time is up; the same command goes on")
            break
        result = {"name": case.name, **asdict(case), **_in_fresh_process(case)}
        known["results"].append(result)
        known["machine"] = result.pop("machine", known.get("machine"))
        print(_line(result), flush=True)
        date = f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}"
        out.parent.mkdir(parents=True, exist_ok=True)
        values = {
            "date": date,
            "machine": known.get("machine"),
            "summary": _summary(known["results"]),
            "results": known["results"],
        }
        out.write_text(json.dumps(values, indent=1) + "\n")
    print(json.dumps(_summary(known["results"]), indent=1))
    return 0


def _interleaved(first: list[Case], second: list[Case]) -> list[Case]:
    """Both halves advance alike, so that a run that is cut short has some of each."""
    pairs = [pair for both in zip(first, second, strict=False) for pair in both]
    return [*pairs, *first[len(second) :], *second[len(first) :]]


def _import_all() -> None:
    """What a configuration's process needs, without touching the GPU: a forked process could not use it then."""
    import torch._dynamo  # noqa: F401
    import transformers.integrations.deepspeed  # noqa: F401
    from transformers import (  # noqa: F401
        Gemma2ForCausalLM,
        GPT2LMHeadModel,
        GPTNeoXForCausalLM,
        LlamaForCausalLM,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
    )

    import foretune.planning
    import foretune.training.build  # noqa: F401


def _in_fresh_process(case: Case) -> dict[str, Any]:
    """Fork, run, read the child's file; what it printed last is the error if there is no file."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="plan-accuracy-") as name:
        answer, log = Path(name) / "answer.json", Path(name) / "log"
        pid = os.fork()
        if pid == 0:
            _child(case, answer, log)
        while not os.waitpid(pid, os.WNOHANG)[0]:
            if time.monotonic() - start > TIMEOUT_SECONDS:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return {"error": f"took longer than {TIMEOUT_SECONDS} s"}
            time.sleep(0.05)
        wall = round(time.monotonic() - start, 1)
        if answer.is_file():
            return {**json.loads(answer.read_text()), "wall_seconds": wall}
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return {"error": " | ".join(lines[-3:])[-600:], "wall_seconds": wall}


def _child(case: Case, answer: Path, log: Path) -> None:
    """Never returns."""
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        answer.write_text(json.dumps(_run_case(case)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        leave(code)


def _plan_of(case: Case, cluster: Any, folder: Path) -> tuple[Any, Any]:
    """(config, plan) of a configuration; `folder` gets the model's config.json."""
    from foretune.config import parse_config
    from foretune.planning import make_plan
    from foretune.planning.shapes import known_config, known_shape

    shape = known_shape(case.model)
    assert shape is not None
    on_cpu = cluster.accelerator.kind == "cpu"
    pins: dict[str, Any] = {
        "zero_stage": case.stage,
        "micro_batch_size_per_gpu": case.micro,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_accumulation_dtype": "auto" if on_cpu else case.sums,
        "checkpointed_layers": round(case.layers * shape.num_layers),
        "offload_optimizer": case.offload if 0 < case.offload < 1 else bool(case.offload),
        "offload_optimizer_step": ("device" if case.streamed else "host") if case.offload else "auto",
        "offload_param": False,
        "attention": case.attention,
        "sum_in_matmul": "auto" if case.sum_in_matmul else False,
        "recompute_pointwise": "auto" if case.recompute_pointwise else False,
        "keep_attention": "auto" if case.keep_attention else False,
        "compile": case.compile,
    }
    (folder / "config.json").write_text(json.dumps(known_config(case.model)))
    config = parse_config(
        {
            "model": str(folder),
            "data": "none",
            "method": case.method,
            "from_scratch": True,
            "plan": pins,
            "train": {"max_length": case.length, "global_batch_size": case.micro * case.accumulation},
        }
    )
    rows = case.micro * case.accumulation
    estimate = _data_of(rows, case.length)
    return config, make_plan(config, model_folder=folder, cluster=cluster, prepared=None, estimate=estimate)


def _data_of(rows: int, length: int) -> Any:
    """Two documents a row, as `_measure` lays them out."""
    from foretune.planning.mathematics import DataEstimate

    return DataEstimate(rows * length, 2 * rows, length // 2, 2 * rows, "two documents a row")


def _predicted(plan: Any) -> dict[str, Any]:
    host = {part: size for part, size in plan.predicted.host_memory_parts.items() if "snapshot" not in part}
    if plan.streams_optimizer:  # nothing is saved here, for which states become whole on the host
        host["optimizer"] = int(plan.offload_optimizer * host["optimizer"])
        del host["copy while saving"]
    return {
        "allocated_bytes": plan.predicted.gpu_memory_bytes - plan.predicted.gpu_memory_parts.get("context", 0),
        "gpu_memory_bytes": plan.predicted.gpu_memory_bytes,
        "parts": plan.predicted.gpu_memory_parts,
        "phase": plan.predicted.peak_phase,
        "host_bytes": sum(host.values()),
        "step_seconds": plan.predicted.step_seconds,
        "step_parts": plan.predicted.step_parts,
    }


def _run_case(case: Case) -> dict[str, Any]:
    """The child: plan, build, three steps; what was predicted and measured."""
    from foretune.errors import NoPlanFits, UserError
    from foretune.planning import probe

    cluster = probe(1)
    with tempfile.TemporaryDirectory(prefix="plan-accuracy-") as name:
        try:
            config, plan = _plan_of(case, cluster, Path(name))
        except (NoPlanFits, UserError) as refusal:
            return {"refused": str(refusal)}
        # The parent may not ask: whoever has touched the GPU cannot fork.
        predicted = {
            "machine": machine(),
            "cluster": json.loads(cluster.model_dump_json()),
            "predicted": _predicted(plan),
        }
        try:
            return {**predicted, "measured": _measure(plan, config)}
        except Exception as error:
            text = " ".join(str(error).split())[:500]
            return {**predicted, "error": f"{type(error).__name__}: {text}"}


def _again(path: Path) -> int:
    """Write the predictions of today beside what was measured then."""
    from foretune.artifacts import Cluster

    values = json.loads(path.read_text())
    names = {field.name for field in fields(Case)}
    for result in values["results"]:
        if "predicted" not in result:
            continue
        # What was measured before there was a choice.
        before = {"sum_in_matmul": False, "recompute_pointwise": False, "keep_attention": False}
        case = Case(**before | {name: value for name, value in result.items() if name in names})
        with tempfile.TemporaryDirectory(prefix="plan-accuracy-") as name:
            _, plan = _plan_of(case, Cluster.model_validate(result["cluster"]), Path(name))
        result["predicted"] = _predicted(plan)
        if "measured" in result:
            result["measured"]["step_seconds"] = _settled(result["measured"]["all_steps_seconds"])
        print(_line(result))
    values["summary"] = _summary(values["results"])
    path.write_text(json.dumps(values, indent=1) + "\n")
    print(json.dumps(values["summary"], indent=1))
    return 0


def _measure(plan: Any, config: Any) -> dict[str, Any]:
    import numpy as np
    import torch

    from foretune.data import MicroBatch
    from foretune.distributed import RankInfo
    from foretune.engine import open_group
    from foretune.model import loading
    from foretune.training.build import build_engine
    from foretune.training.objective import negative_log_likelihood, share_of_mean, to_device

    rank = RankInfo(rank=0, local_rank=0, world_size=1, local_world_size=1)
    device = open_group(rank)
    on_gpu = device.type == "cuda"
    if on_gpu and plan.zero_stage < 3:
        load = loading.load_model

        def load_on_device(*given: Any, **options: Any) -> Any:
            with device:  # made where they are needed: minutes less for the large shapes
                return load(*given, **options)

        loading.load_model = load_on_device
    start = time.monotonic()
    engine, _ = build_engine(assignment_of(config=config, plan=plan, rank=rank), device)
    build_seconds = time.monotonic() - start
    engine.module.train()
    building = torch.cuda.max_memory_allocated() if on_gpu and plan.streams_optimizer else 0
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    random = np.random.default_rng(0)
    shape = (plan.micro_batch_size_per_gpu, plan.max_length)
    vocabulary = engine.module.config.vocab_size
    positions = np.broadcast_to(np.arange(plan.max_length, dtype=np.int64) % (plan.max_length // 2), shape)
    seconds: list[float] = []
    while len(seconds) < FEWEST_STEPS or (len(seconds) < MOST_STEPS and sum(seconds[1:]) < STEP_SECONDS):
        _wait(device)
        start = time.monotonic()
        for _ in range(plan.gradient_accumulation_steps):
            ids = random.integers(0, vocabulary, shape, dtype=np.int64)
            documents = np.cumsum(positions == 0, axis=1) - 1
            batch = MicroBatch(
                input_ids=ids, shift_labels=ids, position_ids=np.ascontiguousarray(positions), document_ids=documents
            )
            scale = share_of_mean(world_size=1, target_tokens=ids.size)
            engine.backward(scale * negative_log_likelihood(engine, to_device(batch, device), gradient_scale=scale))
        engine.step(1e-5)
        _wait(device)
        seconds.append(time.monotonic() - start)
    return {
        "allocated_bytes": max(building, torch.cuda.max_memory_allocated()) if on_gpu else 0,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "device_used_bytes": _device_used() if on_gpu else 0,
        "host_bytes": _host_peak(),
        "step_seconds": _settled(seconds),
        "all_steps_seconds": seconds,
        "build_seconds": build_seconds,
    }


def _settled(seconds: list[float]) -> float:
    """The fastest of the last half, the first step never."""
    return min(seconds[max(1, len(seconds) // 2) :])


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _device_used() -> int:
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _host_peak() -> int:
    """VmHWM: the largest resident set of this process, page-locked buffers included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _errors(results: list[dict[str, Any]], quantity: str) -> list[float]:
    return [
        result["predicted"][quantity] / result["measured"][quantity] - 1
        for result in results
        if "measured" in result and result["measured"].get(quantity)
    ]


def _summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Per half: how many ran, and the relative errors. Host memory counts where something is offloaded."""
    summary: dict[str, Any] = {}
    for half in HALVES:
        chosen = [result for result in results if result["half"] == half]
        figures: dict[str, Any] = {
            "configurations": len(chosen),
            "measured": sum("measured" in result for result in chosen),
            "refused": sum("refused" in result for result in chosen),
            "failed": [result["name"] for result in chosen if "error" in result],
            "out of memory though planned": [
                result["name"] for result in chosen if "out of memory" in result.get("error", "").lower()
            ],
        }
        offloaded = [result for result in chosen if result["offload"]]
        for quantity, of in (("allocated_bytes", chosen), ("host_bytes", offloaded), ("step_seconds", chosen)):
            errors = _errors(of, quantity)
            if errors:
                sizes = sorted(abs(error) for error in errors)
                worst = max(errors, key=abs)
                figures[quantity] = {"median": round(statistics.median(sizes), 4), "worst": round(worst, 4)}
        summary[half] = figures
    return summary


def _line(result: dict[str, Any]) -> str:
    head = f"{result['half'][:5]} {result['name']:<58}"
    if "measured" not in result:
        return f"{head} {result.get('error') or 'refused: ' + result.get('refused', '')}"[:300]
    predicted, measured = result["predicted"], result["measured"]
    peak = ""
    if measured["allocated_bytes"]:
        ratio = predicted["allocated_bytes"] / measured["allocated_bytes"] - 1
        reserved = measured["reserved_bytes"] / GIB
        peak = f"{measured['allocated_bytes'] / GIB:6.2f} GiB {ratio:+6.1%} (reserved {reserved:.2f})  "
    step = predicted["step_seconds"] / measured["step_seconds"] - 1
    host = f"  host {measured['host_bytes'] / GIB:.1f} against {predicted['host_bytes'] / GIB:.1f} GiB"
    return f"{head} {peak}{measured['step_seconds']:.3f} s {step:+6.1%}{host}  in {result['wall_seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
