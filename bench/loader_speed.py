"""How fast the loader hands out tokens, alone: an upper bound of what a step can wait for it.

    python bench/loader_speed.py --model SMOLLM2_FOLDER --data gsm8k_train.jsonl [--length 4096] [--rows 32]

Times the two things that a step asks of the data side, as the loop does: building the rows of a global batch from the
memory-mapped documents, and handing each micro-batch to the device. One process, one thread. While training, the next
step's rows are built while the device computes, so a step waits for less. Every step's figure is in the journal:
``seconds_by_phase["data"]``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from measuring import machine, save_result


def main() -> None:
    """Prepare, then step through the loader."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=32, help="of a global batch")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: bench/results)")
    asked = parser.parse_args()

    import torch

    from foretune.config import load_config
    from foretune.data import open_loader
    from foretune.data.prepare import prepare
    from foretune.training.objective import to_device

    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = [f"train.max_length={asked.length}", "evaluate.validation=0"]
    config = load_config(flags={"model": str(asked.model), "data": str(asked.data)}, settings=settings)
    build, hand_over, tokens = [], [], []
    with tempfile.TemporaryDirectory() as name:
        prepare(config, model_folder=asked.model, out=Path(name) / "data")
        loader = open_loader(Path(name) / "data", seed=0, global_batch_size=asked.rows, rank=0, world_size=1,
                             micro_batch_size=asked.micro_batch)  # fmt: skip
        for step in range(asked.steps):
            start = time.perf_counter()
            batch = loader.step(step)
            built = time.perf_counter()
            for micro_batch in batch.micro_batches:
                to_device(micro_batch, device)
            hand_over.append(time.perf_counter() - built)
            build.append(built - start)
            tokens.append(batch.tokens)
    seconds = [a + b for a, b in zip(build, hand_over, strict=True)]
    result = {
        "length": asked.length, "rows": asked.rows, "micro_batch": asked.micro_batch, "device": device.type,
        "build_seconds": statistics.median(build), "hand_over_seconds": statistics.median(hand_over),
        "tokens_per_second": statistics.median(count / one for count, one in zip(tokens, seconds, strict=True)),
    }  # fmt: skip
    print(result)
    save_result("loader-speed", {"machine": machine(), **result}, folder=asked.out)


if __name__ == "__main__":
    main()
