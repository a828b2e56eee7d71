"""Trains a small model as a rank does, under torch's profiler; prints how often a step copied to the host and waited.

Started by test_gpu_speed.py as ``waits_of_a_step.py STAGE GRADIENT_DTYPE``.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from foretune.config.schema import TrainConfig
from foretune.data import MicroBatch, StepBatch
from foretune.distributed import leave, rank_info
from foretune.engine import DeepSpeedEngine, build_optimizer, close_group, open_group
from foretune.model.attention import use_packed_attention
from foretune.model.compilation import compile_layers, compiled_graphs
from foretune.model.loss import attach_loss
from foretune.training.loop import train
from foretune.training.state import TrainState

ROWS, LENGTH, MICRO_BATCHES, WARM_UP, STEPS = 2, 512, 3, 4, 5


class Rows:
    """Rows of documents of any length, other ones at every step."""

    def step(self, step: int) -> StepBatch:
        generator = np.random.default_rng(step)
        batches = []
        for _ in range(MICRO_BATCHES):
            ids = generator.integers(0, 512, (ROWS, LENGTH))
            positions = np.zeros_like(ids)
            for row in positions:
                cuts = np.sort(generator.choice(np.arange(1, LENGTH), generator.integers(1, 30), replace=False))
                for start, stop in zip([0, *cuts], [*cuts, LENGTH], strict=True):
                    row[start:stop] = np.arange(stop - start)
            labels = np.roll(ids, -1, 1)
            labels[np.roll(positions, -1, 1) == 0] = -100
            labels[:, : generator.integers(1, 100)] = -100
            batches.append(MicroBatch(ids, labels, positions, np.zeros_like(ids)))
        targets = int(sum((batch.shift_labels != -100).sum() for batch in batches))
        return StepBatch(batches, targets, MICRO_BATCHES * ROWS * LENGTH, MICRO_BATCHES * ROWS, [])


def main() -> None:
    stage, dtype = int(sys.argv[1]), sys.argv[2]
    device = open_group(rank_info())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    use_packed_attention(model)
    attach_loss(model, chunk_tokens=400, fused=True)
    model.to(device)
    deepspeed_config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS, "gradient_accumulation_steps": 1, "train_batch_size": ROWS,
        "managed_gradient_accumulation": False, "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": False}, "data_types": {"grad_accum_dtype": dtype},
        "bf16": {"enabled": True, "immediate_grad_update": True}, "timers": {"throughput": {"enabled": False}},
    }  # fmt: skip
    optimizer = build_optimizer(model.parameters(), TrainConfig(), learning_rate=1e-4)
    engine = DeepSpeedEngine(model, optimizer, deepspeed_config, device=device)
    compile_layers(model)
    state = TrainState()

    def go(until: int) -> None:
        train(engine, Rows(), state, total_steps=until, learning_rate=lambda step: 1e-4, hooks=[])  # type: ignore[arg-type]

    go(WARM_UP)
    graphs = compiled_graphs()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        go(WARM_UP + STEPS)
    counts = {"copies to the host": 0.0, "waits for the device": 0.0, "copies to the device": 0.0}
    for event in profiled.key_averages():
        if "Memcpy DtoH" in event.key:
            counts["copies to the host"] += event.count / STEPS
        elif event.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize"):
            counts["waits for the device"] += event.count / STEPS
        elif "Memcpy HtoD" in event.key:
            counts["copies to the device"] += event.count / STEPS
    close_group()
    print("RESULT" + json.dumps(counts | {"graphs": graphs, "graphs later": compiled_graphs() - graphs}))


if __name__ == "__main__":
    main()
    leave()
