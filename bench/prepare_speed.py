"""Preparing data: ours against TRL's own tokenise-and-pack, each in a fresh process on the same cores.

    python bench/prepare_speed.py --data gsm8k_train.jsonl --model MODEL_FOLDER [--copies 50] [--trl FOLDER]

In: GSM8K's rows (question, answer), every copy numbered so that no two rows are equal.  Out: a table, and JSON with
date, versions and machine under bench/results/.

Both read a JSON Lines file, apply the same chat template, learn the answers only and pack rows of 1024 tokens with
best-fit-decreasing. TRL gets the rows in its own form (prompt, completion: lists of messages); ours does more within
its time: it drops duplicates, holds out validation documents, checks token ids and writes a manifest. FOLDER is where
TRL is installed if not beside foretune (``pip install --target FOLDER --no-deps trl``).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import Watch, machine, save_result

MAX_LENGTH = 1024


def write_rows(source: Path, target: Path, copies: int, form: str) -> int:
    """`copies` numbered copies of the rows of `source`, as ours or TRL reads them; returns how many."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    with target.open("w") as file:
        for copy in range(copies):
            for row in rows:
                question = f"[{copy}] {row['question']}"
                written: dict[str, Any] = {"question": question, "answer": row["answer"]}
                if form == "trl":
                    written = {
                        "prompt": [{"role": "user", "content": question}],
                        "completion": [{"role": "assistant", "content": row["answer"]}],
                    }
                file.write(json.dumps(written) + "\n")
    return copies * len(rows)


def run_ours(data: Path, model: Path, scratch: Path, num_proc: int) -> dict[str, Any]:
    """`foretune prepare` from its function on."""
    import datasets  # noqa: F401  # neither contender's imports are timed
    import transformers  # noqa: F401

    from foretune.config import load_config
    from foretune.data.prepare import prepare

    settings = [f"train.max_length={MAX_LENGTH}", f"data.num_proc={num_proc}"]
    config = load_config(flags={"model": str(model), "data": str(data)}, settings=settings)
    start = time.perf_counter()
    prepared = prepare(config, model_folder=model, out=scratch / "prepared")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "documents": prepared.documents, "tokens": prepared.tokens, "packs": prepared.packs}


def run_trl(data: Path, model: Path, scratch: Path, num_proc: int) -> dict[str, Any]:
    """Loading the file and building an `SFTTrainer`, which tokenises and packs, around a model of no size."""
    import datasets
    import torch

    datasets.disable_progress_bars()
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    tiny = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=1, num_key_value_heads=1)
    )  # fmt: skip
    start = time.perf_counter()
    dataset = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=str(scratch / "cache"))
    options = SFTConfig(
        output_dir=str(scratch / "out"), max_length=MAX_LENGTH, packing=True, packing_strategy="bfd",
        dataset_num_proc=num_proc, report_to=[], use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(model=tiny, args=options, train_dataset=dataset, processing_class=tokenizer)
    seconds = time.perf_counter() - start
    packed = trainer.train_dataset
    tokens = sum(len(ids) for batch in packed.select_columns(["input_ids"]).iter(1000) for ids in batch["input_ids"])
    return {"seconds": seconds, "documents": len(dataset), "tokens": tokens, "packs": len(packed)}


CONTENDERS = {"foretune": run_ours, "trl": run_trl}


def _child(name: str, data: Path, *rest: Any, answer: Any) -> None:
    os.setsid()
    try:
        result = CONTENDERS[name](data, *rest)
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        answer.send(result | {"cpu_seconds": sum(one.ru_utime + one.ru_stime for one in usage)})
    except Exception as error:
        answer.send({"error": f"{type(error).__name__}: {error}"})


def measure(name: str, data: Path, model: Path, num_proc: int) -> dict[str, Any]:
    """Run one contender in a fresh process; its figures and the peak memory of its process tree."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory(dir=data.parent) as scratch:
        process = context.Process(
            target=_child, args=(name, data, model, Path(scratch), num_proc), kwargs={"answer": theirs}
        )
        process.start()
        with Watch(process.pid) as watch:
            result: dict[str, Any] = ours.recv()
            process.join()
        return result | watch.peaks()


def main() -> None:
    """Measure every contender at the asked size, and ours at a tenth of it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=50)
    parser.add_argument("--num-proc", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--trl", type=Path, help="folder that TRL is installed in")
    parser.add_argument("--contenders", default="foretune,trl")
    asked = parser.parse_args()
    if asked.trl:
        os.environ["PYTHONPATH"] = str(asked.trl)
        sys.path.insert(0, str(asked.trl))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for copies in sorted({max(1, asked.copies // 10), asked.copies}):
            for name in asked.contenders.split(","):
                if name == "trl" and copies != asked.copies:
                    continue
                data = Path(folder) / f"{name}-{copies}.jsonl"
                rows = write_rows(asked.data, data, copies, name)
                result = measure(name, data, asked.model, asked.num_proc) | {"rows": rows, "bytes": data.stat().st_size}
                results[f"{name} x {copies}"] = result
                print(f"{name:10} {rows:8,} rows  {json.dumps(result)}", flush=True)
                data.unlink()
    ours, trl = results.get(f"foretune x {asked.copies}", {}), results.get(f"trl x {asked.copies}", {})
    ratio = trl["seconds"] / ours["seconds"] if "seconds" in ours and "seconds" in trl else None
    print(f"TRL's time over ours: {ratio}")
    save_result("prepare-speed", {"machine": machine(), "num_proc": asked.num_proc, "max_length": MAX_LENGTH,
                                  "model": asked.model.name, "results": results, "trl_over_ours": ratio})  # fmt: skip


if __name__ == "__main__":
    main()
