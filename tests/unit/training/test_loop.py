"""The loop on plain PyTorch in one process: stopping, resuming, faults."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from foretune.checkpoint.snapshot import FolderWriter
from foretune.config.schema import TrainConfig
from foretune.data import MicroBatch, StepBatch
from foretune.engine import FakeEngine, build_optimizer
from foretune.errors import MachineFault
from foretune.training.loop import StepReport, train
from foretune.training.state import TrainState

VOCAB = 11


class TinyModel(torch.nn.Module):
    """Σ nll of a bigram table, with the forward that the loop calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids, position_ids, shift_labels, target_index, gradient_scale):
        logits = self.table(input_ids).flatten(0, 1)[target_index]
        labels = shift_labels.flatten()[target_index]
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


class TinyLoader:
    steps_per_epoch = 100

    def step(self, step: int) -> StepBatch:
        generator = np.random.default_rng(step)
        micro_batches = []
        for _ in range(3):
            ids = generator.integers(0, VOCAB, (2, 7))
            micro_batches.append(MicroBatch(ids, np.roll(ids, -1, 1), np.zeros_like(ids), np.zeros_like(ids)))
        return StepBatch(micro_batches, target_tokens=42, tokens=42, rows=6, documents=[])


class Collect:
    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def after_step(self, report: StepReport, state: TrainState) -> None:
        self.reports.append(report)


def make() -> FakeEngine:
    model = TinyModel()
    return FakeEngine(model, build_optimizer(model.parameters(), TrainConfig(), learning_rate=0.1), max_grad_norm=1.0)


def go(engine: FakeEngine, state: TrainState, total: int, **options) -> tuple[bool, list[StepReport]]:
    collect = Collect()
    finished = train(
        engine, TinyLoader(), state, total_steps=total, learning_rate=lambda s: 0.1, hooks=[collect], **options
    )
    return finished, collect.reports


def test_it_learns_and_counts() -> None:
    state = TrainState()
    finished, reports = go(make(), state, 8)
    assert finished
    assert [report.step for report in reports] == list(range(1, 9))
    assert reports[0].loss == pytest.approx(np.log(VOCAB), abs=0.8)
    assert (state.step, state.tokens, state.target_tokens) == (8, 8 * 42, 8 * 42)
    assert set(reports[0].seconds_by_phase) >= {"data", "forward", "backward", "step"}


def test_stop_after_the_step_that_saw_the_request() -> None:
    asked = itertools.chain([False, False, True], itertools.repeat(True))
    state = TrainState()
    finished, reports = go(make(), state, 8, stop_requested=lambda: next(asked))
    assert not finished
    assert state.step == 3
    assert reports[-1].stop


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = make()
    _, expected = go(whole, TrainState(), 7)
    first, state = make(), TrainState()
    go(first, state, 3)
    first.save(FolderWriter(tmp_path))
    second, restored = make(), TrainState()
    second.load(tmp_path)
    restored.load_state_dict(state.state_dict())
    _, rest = go(second, restored, 7)
    assert [report.loss for report in rest] == [report.loss for report in expected[3:]]
    for ours, theirs in zip(second.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_not_finite_is_a_fault_with_its_step() -> None:
    engine = make()
    with torch.no_grad():
        engine.module.table.weight[:] = float("nan")
    with pytest.raises(MachineFault, match="not finite") as fault:
        go(engine, TrainState(), 3)
    assert (fault.value.kind, fault.value.step) == ("non_finite", 0)
