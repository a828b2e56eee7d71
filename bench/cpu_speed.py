"""Training on a CPU: two ranks of ours (ZeRO-2) against the plain transformers Trainer on the same cores and rows.

    python bench/cpu_speed.py --model SMOLLM2_FOLDER --data gsm8k_train.jsonl [--steps 4] [--length 256]

Both train the same packed rows of the same prepared data in the same order, 16 rows a step (accumulation 8), fp32,
AdamW, gradients clipped to 1. The Trainer is one process with a thread per core, which is what it is without a
launcher; it is given the position ids of the packed rows, so that it isolates documents as ours does. The median step
counts, after the first. Each contender is a fresh process (ours: two ranks under torchrun); `--rounds` alternates them,
so that both meet the same neighbours.

Processor seconds of a step (all threads, both ranks) are recorded too: where other programs take turns on the cores
they say what the clock cannot, how much work a step is. They leave out waiting, which a step of ours has in collectives
and the Trainer's has where one of its threads has nothing to do.
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
from itertools import pairwise
from pathlib import Path
from typing import Any

from measuring import assignment_of, machine, save_result

MICRO_BATCH, ACCUMULATION, RANKS = 1, 8, 2
ROWS = MICRO_BATCH * ACCUMULATION * RANKS
LEARNING_RATE = 1e-4


def settings(spec: dict[str, Any]) -> list[str]:
    """The configuration of ours."""
    return [
        f"train.max_length={spec['length']}", f"train.global_batch_size={ROWS}", f"train.max_steps={spec['steps']}",
        f"train.learning_rate={LEARNING_RATE}", "plan.zero_stage=2", f"plan.micro_batch_size_per_gpu={MICRO_BATCH}",
        "evaluate.validation=0",
    ]  # fmt: skip


def run_foretune(spec: dict[str, Any]) -> dict[str, Any] | None:
    """One rank; rank 0 returns the figures."""
    from foretune.artifacts import PreparedDataset, RunFolder
    from foretune.config import load_config
    from foretune.distributed import rank_info
    from foretune.engine import close_group, open_group
    from foretune.planning import make_plan
    from foretune.planning.machines.hardware import probe
    from foretune.training.build import build_engine, build_loader
    from foretune.training.loop import train
    from foretune.training.state import TrainState

    config = load_config(flags={"model": spec["model"], "data": spec["data"]}, settings=settings(spec))
    run = RunFolder(Path(spec["folder"]))
    prepared = PreparedDataset.read(run.data / PreparedDataset.file_name)
    plan = make_plan(config, model_folder=Path(spec["model"]), cluster=probe(RANKS), prepared=prepared)
    rank = rank_info()
    assignment = assignment_of(run=run, config=config, plan=plan, prepared=prepared, rank=rank)
    times: list[float] = []
    losses: list[float] = []
    tokens: list[int] = []
    phases: list[dict[str, float]] = []
    used = [time.process_time()]

    class Note:
        def after_step(self, report: Any, state: Any) -> None:
            times.append(report.seconds)
            used.append(time.process_time())
            phases.append(report.seconds_by_phase)
            losses.append(report.loss)
            tokens.append(report.tokens)

    device = open_group(rank)
    engine, _ = build_engine(assignment, device)
    loader = build_loader(assignment, engine)
    used[0] = time.process_time()
    train(engine, loader, TrainState(), total_steps=spec["steps"], learning_rate=lambda step: LEARNING_RATE,
          hooks=[Note()])  # fmt: skip
    processor = engine.sum_over_ranks([after - before for before, after in pairwise(used)])
    close_group()
    figures = {"step_seconds": times, "processor_seconds": processor, "losses": losses, "tokens": tokens,
               "phases": phases}  # fmt: skip
    return figures if rank.is_main else None


def run_trainer(spec: dict[str, Any]) -> dict[str, Any]:
    """transformers' Trainer over the same rows."""
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from foretune.data import open_loader

    loader = open_loader(Path(spec["folder"]) / "data", seed=0, global_batch_size=ROWS, rank=0, world_size=1,
                         micro_batch_size=RANKS * MICRO_BATCH)  # fmt: skip
    batches = [loader.step(step) for step in range(spec["steps"])]
    rows = []
    for micro in (micro for batch in batches for micro in batch.micro_batches):
        for ids, labels, positions in zip(micro.input_ids, micro.shift_labels, micro.position_ids, strict=True):
            unshifted = torch.full((len(ids),), -100, dtype=torch.long)
            unshifted[1:] = torch.from_numpy(labels[:-1])
            rows.append({"input_ids": torch.from_numpy(ids), "labels": unshifted,
                         "position_ids": torch.from_numpy(positions)})  # fmt: skip
    times: list[float] = []
    processor: list[float] = []

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start, self.used = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter() - self.start)
            processor.append(time.process_time() - self.used)

    class InOrder(Trainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    model.config.use_cache = False  # with a cache, transformers would not isolate the documents of a row
    arguments = TrainingArguments(
        output_dir=str(Path(spec["folder"]) / "out"), per_device_train_batch_size=RANKS * MICRO_BATCH,
        gradient_accumulation_steps=ACCUMULATION, max_steps=spec["steps"], learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, optim="adamw_torch_fused", disable_tqdm=True,
    )  # fmt: skip

    def stack(items: list[dict[str, Any]]) -> dict[str, Any]:
        return {key: torch.stack([item[key] for item in items]) for key in items[0]}

    trainer = InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[Timer()], data_collator=stack)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"step_seconds": times, "processor_seconds": processor, "losses": losses,
            "tokens": [batch.tokens for batch in batches]}  # fmt: skip


def measure(name: str, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One contender in fresh processes."""
    file, answer = folder / "spec.json", folder / f"{name}.json"
    file.write_text(json.dumps(spec))
    cores = len(os.sched_getaffinity(0))
    child = [str(Path(__file__)), "--child", name, str(file), str(answer)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}
    if name == "foretune":
        environment["OMP_NUM_THREADS"] = str(max(1, cores // RANKS))
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "--rdzv-backend=c10d",
                    "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]  # fmt: skip
        command = [sys.executable, *launcher, *child]
    else:
        environment["OMP_NUM_THREADS"] = str(cores)
        command = [sys.executable, *child]
    with (folder / f"{name}.log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    if code:
        return {"error": (folder / f"{name}.log").read_text()[-800:]}
    result: dict[str, Any] = json.loads(answer.read_text())
    rates = [count / seconds for count, seconds in zip(result["tokens"], result["step_seconds"], strict=True)]
    return result | {"tokens_per_second": statistics.median(rates[1:])}


def main() -> None:
    """Prepare once, measure both."""
    if sys.argv[1] == "--child":
        spec = json.loads(Path(sys.argv[3]).read_text())
        result = run_foretune(spec) if sys.argv[2] == "foretune" else run_trainer(spec)
        if result is not None:
            Path(sys.argv[4]).write_text(json.dumps(result))
        return
    from foretune.config import load_config
    from foretune.data.prepare import prepare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--contenders", default="trainer,foretune")
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    contenders = asked.contenders.split(",")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    loads = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = {"model": str(asked.model), "data": str(asked.data), "steps": asked.steps, "length": asked.length,
                "folder": name}  # fmt: skip
        config = load_config(flags={"model": spec["model"], "data": spec["data"]}, settings=settings(spec))
        prepare(config, model_folder=asked.model, out=folder / "data")
        for contender in contenders * asked.rounds:
            results[contender].append(measure(contender, spec, folder))
            loads.append(os.getloadavg()[0])
            print(contender, json.dumps(results[contender][-1])[:600], flush=True)
    rates = {
        name: statistics.median(one["tokens_per_second"] for one in rounds)
        for name, rounds in results.items()
        if all("tokens_per_second" in one for one in rounds)
    }
    ratio = rates["foretune"] / rates["trainer"] if rates.keys() == {"foretune", "trainer"} else None
    print(f"tokens per second: {rates}; ours over the Trainer's: {ratio}")
    save_result("cpu-speed", {
        "machine": machine(), "load_after_each": loads, "model": asked.model.name, "length": asked.length, "rows": ROWS,
        "results": results, "tokens_per_second": rates, "foretune_over_trainer": ratio,
    })  # fmt: skip


if __name__ == "__main__":
    main()
