"""The search against one that tries everything: nothing that is faster is missed, nothing that fits is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from foretune.config import Config
from foretune.planning import parse_hardware
from foretune.planning.mathematics import DataFacts, workload
from foretune.planning.planner import shape_for
from foretune.planning.search import LOSS_CHUNKS, evaluate, search_space
from foretune.planning.search import space as space_of
from foretune.planning.strategy import Workload

CASES: list[tuple[str, str, int, int, dict[str, Any]]] = [
    # model, machine, length of rows, rows of a batch, what is asked for beside
    ("gpt2", "1xRTX4090,ram=32GB", 1024, 100, {}),
    ("SmolLM2-135M", "1xRTX3060,ram=32GB", 2048, 24, {}),
    ("SmolLM2-135M", "2xT4,ram=48GB", 8192, 7, {"method": "lora"}),
    ("gemma-3-1b", "2xT4,ram=48GB", 32768, 8, {"plan": {"zero_stage": 2}}),
    ("gemma-3-1b", "2xRTX3080,ram=160GB", 2560, 64, {"plan": {"compile": False, "offload_optimizer": True}}),
    ("Qwen2.5-1.5B", "4xT4,ram=96GB", 65536, 11, {"method": "lora"}),
    ("Qwen2.5-0.5B", "1xRTX3060,ram=160GB", 8192, 6, {}),
    ("Qwen2.5-0.5B", "1xH100-80GB,ram=125GB", 65536, 2, {}),
    ("Qwen2.5-0.5B", "1xA10,ram=64GB", 4096, 12, {"plan": {"checkpointed_layers": 3}}),
    ("Qwen2.5-0.5B", "1xA10,ram=64GB", 4096, 12, {"plan": {"loss_chunk_tokens": 256}}),
    ("SmolLM2-135M", "2xcpu,ram=6GB", 512, 16, {}),
]


def everything(config: Config, work: Workload, cluster: Any) -> list[float]:
    """Seconds of all that fits: each number of layers with each chunk, whole and with less inside, of each batch."""
    plan, layers = config.plan, range(work.shape.num_layers + 1)
    depths = layers if plan.checkpointed_layers == "auto" else [plan.checkpointed_layers]
    seconds = []
    for layout in space_of._layouts_with_kernels(config, work, cluster):
        if layout.streamed:
            continue
        for micro_batch, steps in space_of._batches(config, work, cluster):
            batch = layout.but(micro_batch_size=micro_batch, accumulation_steps=steps)
            chunks = LOSS_CHUNKS if plan.loss_chunk_tokens == "auto" else [plan.loss_chunk_tokens]
            for variant in (batch, *space_of._with_less_inside(config, work, batch)):
                for chunk in {min(chunk, micro_batch * work.max_length) for chunk in chunks}:
                    for depth in depths:
                        one = evaluate(work, variant.but(loss_chunk_tokens=chunk, checkpointed_layers=depth), cluster)
                        seconds += [one.seconds] if one.fits else []
    return seconds


@pytest.mark.parametrize(("model", "machine", "length", "rows", "asked"), CASES)
def test_nothing_faster_is_missed(
    config_of: Any, *, model: str, machine: str, length: int, rows: int, asked: dict[str, Any]
) -> None:
    config, cluster, shape = config_of(**asked), parse_hardware(machine), shape_for(model)
    data = DataFacts(length, 10 * rows, 10 * rows, 10 * rows * length, float(length), "", "", equal_documents=True)
    on_gpu = cluster.accelerator.kind == "cuda"
    precision = "fp32" if not on_gpu else "bf16" if cluster.accelerator.bf16 else "fp16"
    accumulation = "fp32" if precision != "fp16" else "fp16"
    work = workload(config, shape, data, precision=precision, accumulation=accumulation, packs=rows)  # type: ignore[arg-type]
    compiled = on_gpu and config.plan.compile != False  # noqa: E712 (it may be "auto")
    work = replace(work, attention="packed" if on_gpu else "sdpa", compiled=compiled)
    best = min(everything(config, work, cluster), default=None)
    found = [one.seconds for one in search_space(config, work, cluster) if one.fits and not one.strategy.streamed]
    assert (best is None) == (not found)
    if best is not None:
        assert min(found) == pytest.approx(best, rel=1e-9)
