"""Recovery on a GPU: equal bits after SIGKILL at 0.5B, a real out-of-memory replanned, what a save of 1.5B costs."""

import json
import shutil
from pathlib import Path
from statistics import median

import pytest
import torch

from foretune import launch, planning
from foretune.artifacts import Plan, RunFolder
from foretune.config import Config, parse_config
from foretune.events import EventKind, read_events
from foretune.pipeline import travel
from foretune.proving.cells import Cell, FaultName, Layout
from foretune.proving.prove import Prover

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
]
TOKENIZER = Path(__file__).parents[1] / "models" / "stories260K"
SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}
ROWS = 16


def write_model(folder: Path, shape: str) -> Path:
    """Only the shape: the weights are drawn when training starts."""
    from transformers import Qwen2Config

    config = Qwen2Config(
        **SHAPES[shape], vocab_size=151936, num_key_value_heads=2, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    return folder


def wanted(
    folder: Path, shape: str, *, steps: int, every: int, stage: int, rows: int = ROWS, length: int = 512, **plan
) -> Config:
    model, data = folder / shape, folder / "sums.jsonl"
    if not model.exists():
        write_model(model, shape)
    sums = [
        {"question": f"{a} plus {b}?", "answer": f"It is {a + b}."}
        for a in range(100)
        for b in range(60 * length // 512)
    ]
    data.write_text("\n".join(json.dumps(row) for row in sums))
    train = {"max_steps": steps, "max_length": length, "global_batch_size": rows, "learning_rate": 1e-4}
    return parse_config(
        {
            "model": str(model),
            "from_scratch": True,
            "data": {"sources": [{"path": str(data)}], "num_proc": 1},
            "train": {**train, "deterministic": plan.pop("deterministic", True)},
            "plan": {"zero_stage": stage, **plan},
            "checkpoint": {"every": every, "keep": 1},
            "recover": {"restarts_per_hour": 100},
            "evaluate": {"validation": 0.0},
        }
    )


def planned(config: Config, out: Path, *, gpus: int = 1) -> tuple[RunFolder, Plan, Config]:
    result = travel(config, out=out, nproc=gpus, until="plan")
    assert result.plan is not None
    return RunFolder(out), result.plan, config


def step_seconds(run: RunFolder) -> float:
    steps = [event["seconds"] for event in read_events(run.events) if event["kind"] == EventKind.STEP]
    return median(steps[2:])


@pytest.mark.parametrize(
    ("fault", "stage", "gpus"),
    [("kill", 1, 1), ("kill", 3, 1), ("kill", 1, 2), ("kill", 3, 2), ("stop", 1, 2)],
    ids=["kill-1", "kill-3", "two-kill-1", "two-kill-3", "two-stop-1"],
)
def test_broken_and_resumed_ends_in_the_same_bits(fault: FaultName, stage: int, gpus: int, tmp_path: Path) -> None:
    """A rank is killed or stopped; where there are two GPUs the other rank waits for it inside NCCL."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")

    def make_run(layout: Layout, out: Path) -> tuple[RunFolder, Plan, Config]:
        return planned(wanted(tmp_path, "0.5B", steps=8, every=4, stage=layout.stage), out, gpus=layout.ranks)

    with Prover(make_run, out=tmp_path / "proof", seed=0) as prover:
        layout = Layout(stage, ranks=gpus)
        result = prover.run_cell(Cell(fault, "backward", layout, rank=gpus - 1, step=6))
        reference = step_seconds(RunFolder(prover.reference(layout).checkpoint.parents[1]))
        seconds = {"deterministic": reference}
        if stage == gpus == 1:  # what being deterministic costs
            config = wanted(tmp_path, "0.5B", steps=8, every=8, stage=stage, deterministic=False)
            run, plan, _ = planned(config, tmp_path / "fast")
            launch.train(run, plan, config)
            seconds["usual"] = step_seconds(run)
    figures = {
        "fault": fault,
        "gpus": gpus,
        "zero_stage": stage,
        "hash_equal": result.hash_equal,
        "steps_lost": result.steps_lost,
        "seconds_lost": result.seconds_lost,
        "step_seconds": seconds,
        "problem": result.problem,
    }
    print("FIGURES " + json.dumps(figures))
    shutil.rmtree(tmp_path)
    assert result.passed, result.problem
    assert result.hash_equal


def test_a_real_out_of_memory_is_replanned_at_the_same_global_batch(tmp_path: Path) -> None:
    pinned = {"micro_batch_size_per_gpu": 16, "checkpointed_layers": 0, "compile": False}
    config = wanted(tmp_path, "0.5B", steps=4, every=4, stage=1, length=1024, **pinned)
    run, plan, _ = planned(config, tmp_path / "run")
    free, _ = torch.cuda.mem_get_info()
    # Another process's memory, which the plan did not know of: 16 rows do not fit into what is left, 8 do.
    hog = torch.empty(free - int(0.75 * plan.predicted.gpu_memory_bytes), dtype=torch.uint8, device="cuda")
    ended = launch.train(run, plan, config, replan=planning.after_out_of_memory)
    events = list(read_events(run.events))
    faults = [(event["cause"], event["step"], event["phase"]) for event in events if event["kind"] == EventKind.FAULT]
    print("FIGURES " + json.dumps({"faults": faults, "micro_batch": ended.micro_batch_size_per_gpu}))
    del hog
    torch.cuda.empty_cache()
    assert {cause for cause, _, _ in faults} == {"device_out_of_memory"}
    assert ended.micro_batch_size_per_gpu < 16
    assert ended.global_batch_size == ROWS
    assert [event["step"] for event in events if event["kind"] == EventKind.STEP][-1] == 4


def test_a_save_of_a_large_model_hardly_stops_training(tmp_path: Path) -> None:
    steps, every = 7, 6  # the first save waits for no other, and its memory is made by then
    config = wanted(
        tmp_path, "1.5B", steps=steps, every=every, stage=1, rows=32, length=4096, deterministic=False, compile=False
    )
    run, plan, _ = planned(config, tmp_path / "run")
    launch.train(run, plan, config)
    events = list(read_events(run.events))
    saved = [event for event in events if event["kind"] == EventKind.CHECKPOINT_SAVED]
    figures = [{key: event[key] for key in ("step", "bytes", "seconds", "blocked_seconds")} for event in saved]
    seconds = step_seconds(run)
    print(
        "FIGURES "
        + json.dumps({"saves": figures, "step_seconds": seconds, "expected": plan.predicted.checkpoint_bytes})
    )
    print(*(event for event in events if event["kind"] in (EventKind.NOTE, EventKind.TRAINING_STARTED)), sep="\n")
    assert saved[0]["step"] == every
    assert saved[0]["blocked_seconds"] <= max(0.05 * saved[0]["seconds"], seconds)
