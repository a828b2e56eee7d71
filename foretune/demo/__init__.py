"""The embedded default: a model of 135M parameters learns to turn sentences into triples, in minutes, on two cores.

    fetch_smollm2 ──▶ folder ┐
    train.jsonl ─────────────┴─ demo_config ──▶ Config ──(the road)──▶ tuned model
    test.jsonl ── measure(base, few_shot=True) · measure(tuned, few_shot=False) ──▶ valid JSON and F1, before and after

The base model is given three worked examples, the tuned one none: the comparison leans towards the base.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretune.demo.dataset import TEST_FILE, TRAIN_FILE, Triple, conversation, make_examples, question, read_examples
from foretune.demo.scoring import TripleScore, score
from foretune.demo.smollm2 import fetch_smollm2

#: The longest reference answer has 50 tokens; a base model that rambles is cut here.
MAX_NEW_TOKENS = 64
BATCH_SIZE = 24


@dataclass(frozen=True)
class Measurement:
    """How one model did on the held-out sentences."""

    score: TripleScore
    sentences: list[str]
    answers: list[str]
    references: list[list[Triple]]
    seconds: float


def demo_config(model_folder: Path, data_path: Path = TRAIN_FILE) -> dict[str, Any]:
    """Configuration values of the demo, for `foretune.config.parse_config`.

    Args:
        model_folder: what `fetch_smollm2` returned.
        data_path: training conversations.
    """
    return {
        "model": str(model_folder),
        "data": {"sources": [{"path": str(data_path), "format": "messages"}]},
        "method": "full",
        "train": {
            "epochs": 1.0,
            "max_length": 512,  # two conversations a row
            "global_batch_size": 2,  # a row per rank: about 25 steps
            "learning_rate": 2e-4,  # 3e-4 and more forgets how to copy names
            "schedule": "cosine",
            "warmup_ratio": 0.1,
        },
        "evaluate": {"validation": 0.03},
    }


def few_shot_messages(count: int = 3, *, seed: int = 0) -> list[dict[str, str]]:
    """Worked examples from the training half, as turns to go between instruction and question."""
    examples = random.Random(seed).sample(make_examples("train", 64), count)
    return conversation(examples)[1:]


def measure(model_folder: Path, *, few_shot: bool, device: str | None = None) -> Measurement:
    """Let a model answer the held-out sentences and score it.

    Args:
        model_folder: Hugging Face folder with weights and tokenizer.
        few_shot: put three worked examples before each question.
        device: torch device; a GPU if there is one.
    """
    import torch
    from transformers import AutoTokenizer

    from foretune.model.generate import generate_answers
    from foretune.model.loading import load_model

    started = time.monotonic()
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(model_folder, precision="fp32").to(place)
    tokenizer = AutoTokenizer.from_pretrained(str(model_folder))
    pairs = read_examples(TEST_FILE)
    shots = few_shot_messages() if few_shot else []
    prompts = []
    for sentence, _ in pairs:
        instruction, asked = question(sentence)
        prompts.append([instruction, *shots, asked])
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE)
    references = [triples for _, triples in pairs]
    return Measurement(
        score=score(answers, references),
        sentences=[sentence for sentence, _ in pairs],
        answers=answers,
        references=references,
        seconds=time.monotonic() - started,
    )


__all__ = ["TEST_FILE", "TRAIN_FILE", "Measurement", "TripleScore", "demo_config", "fetch_smollm2", "measure"]
