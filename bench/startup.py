"""From the command to the end of the first step: ours against a bare torchrun script that does the same.

    python bench/startup.py --model tests/models/stories260K --data ROWS.jsonl [--repeats 3] [--ranks 2]
    python bench/startup.py --shape 1.5B [--repeats 3]    # ours alone, on a GPU: nothing compiled yet, then again

Both: the same tiny model, ZeRO-1 by DeepSpeed, the same prepared rows, CPU ranks. The script has the model, the engine
and the first batch in one file, without a plan, a journal, a probe or a checkpoint. Contenders alternate, so that what
else the machine does meets both; the median counts. Where ours spends the time is read from its journal and from
``-X importtime`` of one rank's imports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import machine, save_result

from foretune.distributed import leave
from foretune.events import read_events

LENGTH, ROWS = 128, 8
TOKENIZER = Path(__file__).parents[1] / "tests" / "models" / "stories260K"


def bare(folder: Path, model_folder: Path) -> None:
    """One rank of the script: model, engine, one step; rank 0 writes when it was done."""
    import deepspeed
    import deepspeed.ops
    import torch
    from transformers import AutoModelForCausalLM

    from foretune.data import open_loader

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for 36 s
    deepspeed.init_distributed(verbose=False)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    config = {"train_micro_batch_size_per_gpu": ROWS // world_size, "gradient_accumulation_steps": 1,
              "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    loader = open_loader(folder / "data", seed=0, global_batch_size=ROWS, rank=rank, world_size=world_size,
                         micro_batch_size=ROWS // world_size)  # fmt: skip
    for micro in loader.step(0).micro_batches:
        ids, labels, positions = (
            torch.from_numpy(a) for a in (micro.input_ids, micro.shift_labels, micro.position_ids)
        )
        logits = engine(input_ids=ids, position_ids=positions, use_cache=False).logits
        engine.backward(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    engine.step()
    if rank == 0:
        (folder / "bare-done").write_text(str(time.time()))
    torch.distributed.destroy_process_group()


def time_bare(folder: Path, model: Path, ranks: int) -> float:
    """Seconds from the command to the end of the script's step."""
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", __file__, "--bare", str(folder), str(model),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    start = time.time()
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return float((folder / "bare-done").read_text()) - start


def time_ours(out: Path, arguments: list[str], *, to_the_end: bool = True) -> dict[str, Any]:
    """Seconds from the command to each kind of event in the journal, "step" the first step; where a rank's went.

    Unless it is to go `to_the_end`, it is killed after the first step, before it saves gigabytes.
    """
    for name in ("checkpoints", "launch", "events.jsonl", "plan.json"):
        path = out / name
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True) if not path.is_dir() else None
    command = [sys.executable, "-m", "foretune", "train", *arguments]
    start = time.time()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if not to_the_end and "step" in came_since(start, out):
                process.kill()  # its ranks die with it
                wait_for_ranks(out)
            time.sleep(0.2)
        came = came_since(start, out)
        if "step" not in came or (to_the_end and process.returncode):
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}: {said.read()[-3000:]}")
    return came


def came_since(start: float, out: Path) -> dict[str, Any]:
    """Kinds of events in the journal, and how many seconds after `start` the first of each came."""
    came: dict[str, Any] = {}
    for event in read_events(out / "events.jsonl"):
        if event["time"] >= start:
            came.setdefault(event["kind"], round(event["time"] - start, 3))
            if event["kind"] == "training_started":
                came["seconds_by_phase"] = event["seconds_by_phase"]
    return came


def wait_for_ranks(out: Path) -> None:
    """Until no process works on a run any more: the next start would find the device in use."""

    def command(process: Path) -> bytes:
        try:
            return (process / "cmdline").read_bytes()
        except OSError:  # it has just ended
            return b""

    end = time.monotonic() + 60
    while any(str(out).encode() in command(process) for process in Path("/proc").glob("[0-9]*")):
        if time.monotonic() > end:
            raise RuntimeError(f"ranks of {out} are still there a minute after their command was killed")
        time.sleep(0.2)


def ours(model: Path, data: Path, out: Path, ranks: int, sets: list[str]) -> list[str]:
    """Arguments of ours."""
    sets = [*sets, "train.max_steps=1", "plan.zero_stage=1", "evaluate.validation=0", "checkpoint.keep=1"]
    return ["--model", str(model), "--data", str(data), "--out", str(out), "--nproc", str(ranks), "--quiet",
            *(part for one in sets for part in ("--set", one))]  # fmt: skip


def import_times(top: int = 12) -> list[str]:
    """The slowest imports of a rank, as CPython counts them: cumulative seconds and module."""
    code = "import foretune.training.build, foretune.training.loop, foretune.training.resume"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    found = []
    for line in done.stderr.splitlines():
        if line.startswith("import time:") and "|" in line and "cumulative" not in line:
            _, cumulative, name = line.removeprefix("import time:").split("|")
            found.append((int(cumulative) / 1e6, name.strip()))
    found.sort(reverse=True)
    return [f"{seconds:6.2f} s {name}" for seconds, name in found[:top]]


def model_with_tokenizer(shape: str, folder: Path) -> Path:
    """A folder with random weights of a shape of `throughput.py`, and a small tokenizer."""
    from throughput import make_model

    make_model(shape, folder, seed=0)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder)
    return folder


def shaped(shape: str, repeats: int, out: Path | None) -> None:
    """Ours alone with a model of this shape on one GPU: time to the first step, of which the first start prepares and
    compiles."""
    length, rows = (64, 4) if shape == "tiny" else (4096, 4)
    starts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = model_with_tokenizer(shape, folder / "model")
        data = folder / "rows.jsonl"
        data.write_text("\n".join(json.dumps({"text": "Once upon a time. " * (length // 16)}) for _ in range(4 * rows)))
        sets = [f"train.max_length={length}", f"train.global_batch_size={rows}",
                f"plan.micro_batch_size_per_gpu={rows}"]  # fmt: skip
        if shape != "tiny":
            sets.append("plan.compile=true")  # one step would not be worth it
        arguments = ours(model, data, folder / "run", 1, sets)
        os.environ["HOME"] = name  # where what is compiled is kept
        for _ in range(1 + repeats):
            starts.append(time_ours(folder / "run", arguments, to_the_end=False))
            print(starts[-1], flush=True)
    again = statistics.median(start["step"] for start in starts[1:])
    print(f"first start {starts[0]['step']:.1f} s, then {again:.1f} s")
    save_result(f"startup-{shape}", {"machine": machine(), "starts": starts, "median_after_the_first": again},
                folder=out)  # fmt: skip


def main() -> None:
    """Alternate the contenders and print medians."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its modules compiled
    if sys.argv[1] == "--bare":
        bare(Path(sys.argv[2]), Path(sys.argv[3]))
        leave()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--shape", help="of throughput.py: ours alone, on a GPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: bench/results)")
    asked = parser.parse_args()
    if asked.shape:
        shaped(asked.shape, asked.repeats, asked.out)
        return
    times: dict[str, list[float]] = {"bare": [], "foretune": []}
    came: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = [f"train.max_length={LENGTH}", f"train.global_batch_size={ROWS}",
                f"plan.micro_batch_size_per_gpu={ROWS // asked.ranks}"]  # fmt: skip
        arguments = ours(asked.model, asked.data, folder / "run", asked.ranks, sets)
        subprocess.run([sys.executable, "-m", "foretune", "train", *arguments], check=True, capture_output=True)
        (folder / "data").symlink_to(folder / "run" / "data")
        for _ in range(asked.repeats):
            times["bare"].append(time_bare(folder, asked.model, asked.ranks))
            came = time_ours(folder / "run", arguments)
            times["foretune"].append(came["step"])
            print({name: round(values[-1], 2) for name, values in times.items()}, came, flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    difference = medians["foretune"] - medians["bare"]
    slowest = import_times()
    print(medians, f"difference {difference:.2f} s", *slowest, sep="\n")
    save_result("startup", {"machine": machine(), "ranks": asked.ranks, "seconds": times, "medians": medians,
                            "difference": difference, "events": came, "slowest_imports": slowest},
                folder=asked.out)  # fmt: skip


if __name__ == "__main__":
    main()
