"""Real checkpoints for every test that reads one, written once per session on the real engine; runs around them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from filelock import FileLock
from forked_ranks import forked_ranks

from foretune.artifacts import (
    Accelerator,
    Checkpoint,
    Cluster,
    Plan,
    Prediction,
    PreparedDataset,
    RunFolder,
    SourceSummary,
)
from foretune.config import parse_config, to_yaml

# Tiny models, several processes, few cores: OpenMP threads would wait for each other (a 40 x 40 matmul took 3 ms).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

STORIES = Path(__file__).parents[1] / "models" / "stories260K"
WRITER = Path(__file__).parent / "checkpoint" / "write_engine_checkpoints.py"


class StartRanks(Protocol):
    def __call__(self, world_size: int, script: Path, *arguments: object) -> str: ...


class WriteCheckpoints(Protocol):
    def __call__(self, out: Path, *, cases: str, world_size: int) -> Path: ...


@pytest.fixture(scope="session")
def start_ranks() -> Iterator[StartRanks]:
    """A function: world size, script, its arguments → what its ranks printed; they must not fail."""
    with forked_ranks() as start_all:

        def start(world_size: int, script: Path, *arguments: object) -> str:
            done = start_all([world_size], script, *arguments)
            assert done.returncode == 0, done.stderr[-4000:]
            return done.stdout

        yield start


@pytest.fixture(scope="session")
def write_checkpoints(start_ranks: StartRanks) -> WriteCheckpoints:
    """A function that starts `world_size` ranks, which write the named cases (``A,B`` or ``all``) below `out`."""

    def write(out: Path, *, cases: str, world_size: int) -> Path:
        start_ranks(world_size, WRITER, "--out", out, "--cases", cases)
        return out

    return write


@pytest.fixture(scope="session")
def engine_checkpoints(tmp_path_factory: pytest.TempPathFactory, write_checkpoints: WriteCheckpoints) -> Path:
    """Folder with one subfolder per case of the script, written by two ranks, once for all workers (30 s)."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "engine"
    with FileLock(shared / "engine.lock"):
        if not (written := shared / "engine.written").exists():
            write_checkpoints(folder, cases="all", world_size=2)
            written.touch()
    return folder


class MakeRun(Protocol):
    def __call__(self, case: str, folder: Path, *, chat_template: str | None = None) -> RunFolder: ...


@pytest.fixture
def make_run(engine_checkpoints: Path) -> MakeRun:
    """A function that lays out a run folder around a case's checkpoint, as the stages before would have left it."""

    def make(case: str, folder: Path, *, chat_template: str | None = None) -> RunFolder:
        written = engine_checkpoints / case
        run = RunFolder(folder)
        run.create()
        shutil.copytree(written / "checkpoints", run.checkpoints)
        manifest = Checkpoint.read(next(run.checkpoints.glob("step-*/manifest.json")))
        values = {
            "model": str(written / "base"),
            "data": "/somewhere/private/examples.jsonl",
            "method": manifest.method,
        }
        config = parse_config({**values, "train": {"max_steps": 2}})
        run.config.write_text(to_yaml(config), encoding="utf-8")
        _plan(written / "base", manifest).write(run.plan)
        tokenizer = run.data / "tokenizer"
        shutil.copytree(STORIES, tokenizer, ignore=shutil.ignore_patterns("config.json", "*.safetensors", "gen*"))
        if chat_template is not None:
            (tokenizer / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        _prepared("tokenizer" if chat_template else "none").write(run.data / PreparedDataset.file_name)
        return run

    return make


def _plan(base: Path, manifest: Checkpoint) -> Plan:
    accelerator = Accelerator(
        name="CPU", kind="cpu", memory_bytes=1 << 30, bf16=True, fp16=False, peak_flops=1e11, memory_bandwidth=1e10
    )
    cluster = Cluster(
        accelerator=accelerator, nodes=1, devices_per_node=2, host_memory_bytes=1 << 31, cores_per_node=2,
        link_bandwidth=1e9, network_bandwidth=1e9, probed=True,
    )  # fmt: skip
    predicted = Prediction(
        gpu_memory_bytes=1, gpu_memory_parts={}, host_memory_bytes_per_node=1, checkpoint_bytes=1, disk_bytes=1,
        step_seconds=1.0, tokens_per_second=1.0, total_seconds=1.0,
    )  # fmt: skip
    return Plan(
        model=str(base), method=manifest.method, parameters=50_000, trainable_parameters=50_000, cluster=cluster,
        world_size=2, precision=manifest.precision, zero_stage=manifest.zero_stage, offload_optimizer=0.0,
        offload_param=False, micro_batch_size_per_gpu=2, gradient_accumulation_steps=1,
        gradient_accumulation_dtype="fp32", checkpointed_layers=0, loss_chunk_tokens=64, global_batch_size=4,
        max_length=16, packing=True, learning_rate=1e-2, optimizer="adamw", schedule="cosine", warmup_steps=0,
        total_steps=2, steps_per_epoch=2, checkpoint_every=2, deepspeed_config={}, decisions=[], predicted=predicted,
        rejected=[],
    )  # fmt: skip


def _prepared(chat_template: str) -> PreparedDataset:
    source = SourceSummary(
        path="/somewhere/private/examples.jsonl", format="text", weight=1.0, rows_read=10, documents=9, columns=["text"]
    )
    return PreparedDataset(
        fingerprint="0" * 64, fingerprint_parts={}, max_length=16, max_length_reason="", vocab_size=512,
        eos_token_id=2, pad_token_id=0, chat_template=chat_template, sources=[source], rows_read=10, documents=8,
        validation_documents=0, dropped={"empty": 1}, duplicates=0, truncated_documents=0, truncated_tokens=0,
        split_documents=0, tokens=100, target_tokens=90, validation_tokens=0, validation_target_tokens=0, packs=7,
        fill=0.9, longest_document=16, samples=[], notes=[], seconds=0.1,
    )  # fmt: skip
