"""The stage on real checkpoints and really prepared data, held against losses computed by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from foretune.artifacts import EvaluationReport, RunFolder
from foretune.config import Config, load_config, parse_config, to_yaml
from foretune.data import open_loader
from foretune.data.prepare import prepare
from foretune.errors import UserError, VerificationFailed
from foretune.evaluation import evaluate_model, evaluate_run

STORIES = Path(__file__).parents[2] / "models" / "stories260K"
NOUNS = ("dog", "cat", "tree", "car", "ball", "bird", "fish", "king", "boat", "star", "moon", "box")


def texts(path: Path, count: int = 40) -> Path:
    rows = [
        {"text": f"Once there was a {NOUNS[i % 12]} and a {NOUNS[(i * 5 + i // 12) % 12]}. They ran {i} miles."}
        for i in range(count)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def questions(path: Path, count: int = 30) -> Path:
    rows = [{"question": f"{i} and {i + 1}?", "answer": f"Sum.\n#### {2 * i + 1}"} for i in range(count)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def prepared_run(make_run: Any, case: str, folder: Path, data: Path, **evaluate: Any) -> tuple[RunFolder, Config]:
    """A run around a real checkpoint whose data were really prepared."""
    run = make_run(case, folder)
    shutil.rmtree(run.data)
    old = load_config(run.config)
    values = {"model": old.model, "data": str(data), "method": old.method, "evaluate": {"validation": 0.3, **evaluate}}
    config = parse_config(values)
    run.config.write_text(to_yaml(config), encoding="utf-8")
    prepare(config, model_folder=Path(config.model), out=run.data)
    return run, config


def by_hand(model: Any, run: RunFolder) -> tuple[list[float], list[int]]:
    """Σ nll and targets of each held-out document, each alone, by the model's own logits."""
    loader = open_loader(run.data, seed=0, global_batch_size=1, rank=0, world_size=1, micro_batch_size=1)
    sums, counts = [], []
    for row in loader.validation():
        for number in sorted(set(row.document_ids[0].tolist()) - {-1}):
            mine = row.document_ids[0] == number
            labels = torch.from_numpy(row.shift_labels[0][mine])
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(row.input_ids[0][mine])[None], use_cache=False).logits[0]
            sums.append(float(F.cross_entropy(logits.double(), labels, ignore_index=-100, reduction="sum")))
            counts.append(int((labels != -100).sum()))
    return sums, counts


def models_of(case: Path) -> tuple[Any, Any]:
    """Base and tuned, the latter from the weights that were gathered from the engine itself."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    truth = {name: value for name, value in load_file(case / "truth.safetensors").items() if "fp32." not in name}
    base = AutoModelForCausalLM.from_pretrained(case / "base").eval()
    tuned = AutoModelForCausalLM.from_pretrained(case / "base")
    if any("lora_" in name for name in truth):
        tuned = get_peft_model(tuned, LoraConfig(r=3, lora_alpha=6.0, target_modules="all-linear"))
    result = tuned.load_state_dict(truth, strict=False)
    assert not result.unexpected_keys
    return base, tuned.eval()


@pytest.mark.parametrize("case", ["llama-fp32-3", "gpt2-fp32-3", "lora-fp32-0"])
def test_losses_are_those_computed_by_hand(make_run: Any, engine_checkpoints: Path, tmp_path: Path, case: str) -> None:
    run, config = prepared_run(make_run, case, tmp_path / "run", texts(tmp_path / "texts.jsonl"))
    report = evaluate_run(run, config)
    for model, estimate in zip(models_of(engine_checkpoints / case), (report.base, report.tuned), strict=True):
        sums, counts = by_hand(model, run)
        assert estimate is not None
        assert estimate.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-6)
        assert estimate.perplexity == pytest.approx(math.exp(estimate.loss))
        assert estimate.interval[0] < estimate.loss < estimate.interval[1]
        assert (report.documents, report.target_tokens) == (len(sums), sum(counts))
    assert report.base is not None
    assert report.difference == pytest.approx(report.tuned.loss - report.base.loss)
    assert report.difference_interval is not None
    assert report.difference_interval[0] <= report.difference <= report.difference_interval[1]
    assert report.base.loss != report.tuned.loss
    assert report.step == 2
    assert EvaluationReport.read(run.evaluation) == report


def test_a_bf16_checkpoint_of_adapters_is_scored_in_bf16(
    make_run: Any, engine_checkpoints: Path, tmp_path: Path
) -> None:
    run, config = prepared_run(make_run, "lora-bf16-2", tmp_path / "run", texts(tmp_path / "texts.jsonl"))
    report = evaluate_run(run, config)
    _, tuned = models_of(engine_checkpoints / "lora-bf16-2")
    sums, counts = by_hand(tuned, run)
    assert report.tuned.loss == pytest.approx(sum(sums) / sum(counts), rel=5e-3)


def test_samples_show_both_models_at_the_same_prompts(make_run: Any, tmp_path: Path) -> None:
    run, config = prepared_run(make_run, "llama-fp32-3", tmp_path / "run", texts(tmp_path / "texts.jsonl"))
    report = evaluate_run(run, config)
    assert len(report.samples) == 4
    for sample in report.samples:
        assert sample.prompt.startswith("Once there was a")
        assert sample.reference
        assert sample.base is not None
    assert any(sample.base != sample.tuned for sample in report.samples)


def test_any_file_is_scored_with_the_runs_tokenizer_and_template(make_run: Any, tmp_path: Path) -> None:
    run, config = prepared_run(make_run, "llama-fp32-3", tmp_path / "run", questions(tmp_path / "train.jsonl"))
    other = questions(tmp_path / "other.jsonl", 12)
    report = evaluate_run(run, config, data=str(other), tasks=["gsm8k", "exact_match"])
    assert report.data == str(other)
    assert report.documents == report.documents_available == 12
    assert set(report.tasks) == {"gsm8k", "exact_match"}
    assert report.tasks["gsm8k"]["documents"] == 12.0
    assert report.tasks["exact_match"]["tuned"] == 0.0  # a random model answers nothing right
    assert "### Assistant:" in report.samples[0].prompt
    assert report.samples[0].reference.startswith("Sum.")
    assert not run.evaluation.exists()  # it speaks of the held-out documents only
    written = list((run.path / "evaluation").glob("other-*/evaluation.json"))
    assert [EvaluationReport.read(path) for path in written] == [report]


def test_the_bound_is_kept_and_said(make_run: Any, tmp_path: Path) -> None:
    run, config = prepared_run(make_run, "llama-fp32-3", tmp_path / "run", texts(tmp_path / "texts.jsonl", 100))
    whole = evaluate_run(run, config)
    part = evaluate_run(run, config, max_tokens=100)
    assert whole.documents == whole.documents_available == 30
    assert not [note for note in whole.notes if "to keep the evaluation short" in note]
    assert part.documents_available == 30
    assert part.documents < 10
    assert part.target_tokens < 200
    assert any(f"scored {part.documents} of 30 documents" in note for note in part.notes)
    assert any("intervals are rough" in note for note in part.notes)


def test_answers_stay_within_the_models_context(make_run: Any, tmp_path: Path) -> None:
    """GPT-2 has 64 positions here and fails beyond them; prompts that leave no room are not answered."""
    rows = [{"question": " ".join(NOUNS) * (1 + i % 3), "answer": f"#### {i}"} for i in range(30)]
    data = tmp_path / "long.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    run, config = prepared_run(make_run, "gpt2-fp32-3", tmp_path / "run", data)
    report = evaluate_run(run, config, data=str(texts(tmp_path / "texts.jsonl")))
    assert len(report.samples) == 4
    with pytest.raises(UserError, match="leave room for an answer"):
        evaluate_run(run, config, data=str(data), tasks=["gsm8k"])


def test_a_run_from_scratch_has_no_base(make_run: Any, tmp_path: Path) -> None:
    run, config = prepared_run(make_run, "llama-fp32-3", tmp_path / "run", texts(tmp_path / "texts.jsonl"))
    with_base = evaluate_run(run, config)
    report = evaluate_run(run, config.model_copy(update={"from_scratch": True}))
    assert report.base is report.difference is report.difference_interval is None
    assert report.tuned == with_base.tuned  # the random start leaves no trace
    assert all(sample.base is None for sample in report.samples)


def test_refusals(make_run: Any, tmp_path: Path) -> None:
    run, config = prepared_run(make_run, "llama-fp32-3", tmp_path / "run", texts(tmp_path / "a.jsonl"), validation=0.0)
    with pytest.raises(UserError) as caught:
        evaluate_run(run, config)
    assert caught.value.field == "evaluate.validation"
    with pytest.raises(UserError) as caught:
        evaluate_run(run, config, tasks=["squad"])
    assert caught.value.field == "evaluate.tasks"
    with pytest.raises(UserError, match="with a prompt and an answer"):
        evaluate_run(run, config, data=str(tmp_path / "a.jsonl"), tasks=["exact_match"])
    with pytest.raises(UserError):
        evaluate_run(run, config, data=str(tmp_path / "missing.jsonl"))
    shutil.rmtree(run.checkpoints)
    with pytest.raises(UserError, match="no complete checkpoint"):
        evaluate_run(run, config, data=str(tmp_path / "a.jsonl"))


def test_a_damaged_checkpoint_is_not_evaluated(make_run: Any, tmp_path: Path) -> None:
    run, config = prepared_run(make_run, "llama-fp32-3", tmp_path / "run", texts(tmp_path / "texts.jsonl"))
    shard = next(run.checkpoints.glob("*/engine/*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(VerificationFailed, match="is damaged"):
        evaluate_run(run, config)
    assert not run.evaluation.exists()


def test_a_model_folder_alone(tmp_path: Path) -> None:
    stories = tmp_path / "stories.jsonl"
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    stories.write_text("\n".join(json.dumps({"text": story + f"One day, she saw {noun}s."}) for noun in NOUNS), "utf-8")
    report = evaluate_model(STORIES, data=str(stories))
    assert report.base is None
    assert report.documents == len(NOUNS)
    assert 1.5 < report.tuned.perplexity < 6.0  # a trained model on its own kind of text; an untrained one has 512
    noise = tmp_path / "noise.jsonl"
    random = np.random.default_rng(0)
    words = [" ".join("".join(random.choice(list("bcdfgkpqxz"), 4)) for _ in range(12)) for _ in range(6)]
    noise.write_text("\n".join(json.dumps({"text": text}) for text in words), encoding="utf-8")
    assert evaluate_model(STORIES, data=str(noise)).tuned.perplexity > 20.0
