"""The same mathematics everywhere: real DeepSpeed engines against one float64 process of plain PyTorch.

ZeRO 0-3 x world sizes 1, 2, 4 x accumulation 1, 4 x packed or each document alone: 48 trainings of 5 steps. The
reference knows nothing of packs, ranks or chunks: it reads the documents of each global batch one by one. Then 33 in
bf16 with weight decay, gradients summed in bf16 or fp32, with a GPU's shortcuts or without: as close as bf16's rounding
lets them be.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_ranks import forked_ranks
from parity_worker import ACCUMULATIONS, BATCH_ROWS, DECAY, LEARNING_RATE, PACKED, SEED, STAGES, STEPS, SUMS
from transformers import AutoModelForCausalLM, LlamaConfig

from foretune.artifacts import IGNORE_INDEX
from foretune.config import load_config
from foretune.data import open_loader
from foretune.data.prepare import prepare

TOKENIZER = Path(__file__).parents[1] / "models" / "stories260K"
WORLD_SIZES = (1, 2, 4)
RELATIVE = 2e-6  # losses and gradient norms, fp32 against float64
WEIGHTS = 1e-3  # norm of the weights' difference over the norm of the update
ROUNDED = 0.03  # difference of a loss in bf16, over how far the loss falls; an Adam that counts one step more has 0.1
SHORTCUTS = 1e-3  # what the norm's last bits do to losses: a weight in bf16 may round the other way
CASES = [
    (world, f"zero{stage}-accumulation{accumulation}-{'packed' if packed else 'alone'}")
    for world in WORLD_SIZES
    for stage in STAGES
    for accumulation in ACCUMULATIONS
    for packed in PACKED
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, a prepared data set of questions and answers of very different lengths."""
    folder = tmp_path_factory.mktemp("parity")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((TOKENIZER / name).read_bytes())
    generator = np.random.default_rng(1)
    words = ["the", "cat", "sat", "on", "a", "red", "mat", "and", "saw", "big", "dogs", "run", "home", "today"]
    rows = [
        {
            "question": " ".join(generator.choice(words, generator.integers(2, 9))),
            "answer": " ".join(generator.choice(words, generator.integers(1, 24))),
        }
        for _ in range(160)
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    wanted = load_config(
        flags={"model": str(folder / "model"), "data": str(folder / "rows.jsonl")},
        settings=["train.max_length=96", "evaluate.validation=0", "data.num_proc=1"],
    )
    prepare(wanted, model_folder=folder / "model", out=folder / "data")
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict:
    return plain_training(folder, weight_decay=0.0)


@pytest.fixture(scope="module")
def decayed(folder: Path) -> dict:
    return plain_training(folder, weight_decay=DECAY)


def plain_training(folder: Path, *, weight_decay: float) -> dict:
    """Plain PyTorch in float64: one document at a time, whole logits, AdamW; vectors are not decayed."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    loader = open_loader(
        folder / "data",
        seed=SEED,
        global_batch_size=BATCH_ROWS,
        rank=0,
        world_size=1,
        micro_batch_size=1,
        packing=False,
    )
    losses, norms = [], []
    for step in range(STEPS):
        total, targets = 0.0, 0
        for row in loader.step(step).micro_batches:
            length = int((row.document_ids[0] >= 0).sum())
            logits = model(input_ids=torch.from_numpy(row.input_ids[:, :length]), use_cache=False).logits[0]
            labels = torch.from_numpy(row.shift_labels[0, :length])
            total = total + torch.nn.functional.cross_entropy(
                logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"
            )
            targets += int((labels != IGNORE_INDEX).sum())
        loss = total / targets
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    after = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    return {"losses": losses, "grad_norms": norms, "before": before, "after": after}


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict:
    """Every layout, by real engines: one launch per world size."""
    with forked_ranks() as start:
        done = start(WORLD_SIZES, Path(__file__).parent / "parity_worker.py", folder, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    results = {}
    for world_size in WORLD_SIZES:
        values = json.loads((folder / f"world-{world_size}.json").read_text())
        weights = np.load(folder / f"world-{world_size}.npz")
        for name, value in values.items():
            prefix = f"{name}/"
            after = {key.removeprefix(prefix): weights[key] for key in weights.files if key.startswith(prefix)}
            results[world_size, name] = {**value, "after": after}
    return results


def update_error(reference: dict, after: dict) -> float:
    """‖after - reference after‖ over ‖reference after - before‖, all weights as one vector."""
    assert set(after) == set(reference["after"])
    difference = sum(float(((after[n] - reference["after"][n]) ** 2).sum()) for n in after)
    update = sum(float(((reference["after"][n] - reference["before"][n]) ** 2).sum()) for n in after)
    return (difference / update) ** 0.5


@pytest.mark.parametrize(("world_size", "name"), CASES)
def test_same_mathematics(world_size: int, name: str, trained: dict, reference: dict) -> None:
    case = trained[world_size, name]
    np.testing.assert_allclose(case["losses"], reference["losses"], rtol=RELATIVE)
    np.testing.assert_allclose(case["grad_norms"], reference["grad_norms"], rtol=RELATIVE)
    assert update_error(reference, case["after"]) <= WEIGHTS


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", [f"bf16-zero{stage}-{sums}" for stage in STAGES for sums in SUMS[stage]])
def test_the_same_up_to_rounding_in_16_bits(world_size: int, name: str, trained: dict, decayed: dict) -> None:
    fall = decayed["losses"][0] - decayed["losses"][-1]
    np.testing.assert_allclose(trained[world_size, name]["losses"], decayed["losses"], atol=ROUNDED * fall)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", [f"bf16-zero{stage}-{sums}" for stage in (1, 2) for sums in SUMS[stage]])
def test_a_gpus_shorter_step_is_the_same_step(world_size: int, name: str, trained: dict) -> None:
    plain, short = trained[world_size, name], trained[world_size, f"{name}-as-on-gpu"]
    np.testing.assert_allclose(short["losses"], plain["losses"], rtol=SHORTCUTS)
    np.testing.assert_allclose(short["grad_norms"], plain["grad_norms"], rtol=10 * SHORTCUTS)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gate_and_up_and_q_k_v_lie_side_by_side_in_zero_1(world_size: int, trained: dict) -> None:
    """In DeepSpeed's buffers of weights and of sums, as fused products need it; nowhere else."""
    cases = {name: case["fused"] for (world, name), case in trained.items() if world == world_size}
    assert {name for name, modules in cases.items() if any(modules)} == {"bf16-zero1-fp32-as-on-gpu"}
    assert cases["bf16-zero1-fp32-as-on-gpu"] == [2, 2]


def test_untrained_weights_fail(reference: dict) -> None:
    assert update_error(reference, reference["before"]) > 100 * WEIGHTS


def test_batches_really_differ_in_layout(folder: Path) -> None:
    """Several documents share a row, and target counts differ between micro-batches: means of means would show."""
    loader = open_loader(
        folder / "data", seed=SEED, global_batch_size=BATCH_ROWS, rank=0, world_size=2, micro_batch_size=1
    )
    batch = loader.step(0)
    counts = [int((row.shift_labels != IGNORE_INDEX).sum()) for row in batch.micro_batches]
    assert len(batch.documents) > BATCH_ROWS
    assert len(set(counts)) > 1
