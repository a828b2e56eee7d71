"""Scores of packed documents equal those of each document alone, by the model's own loss, in every tested family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foretune.artifacts import IGNORE_INDEX
from foretune.model.scoring import score_documents

VOCABULARY = 97
CPU = torch.device("cpu")


@dataclass
class Batch:
    input_ids: np.ndarray
    shift_labels: np.ndarray
    position_ids: np.ndarray
    document_ids: np.ndarray


def tiny(family: str) -> Any:
    from transformers import (
        AutoModelForCausalLM,
        Gemma2Config,
        GPT2Config,
        LlamaConfig,
        MistralConfig,
        Qwen3Config,
    )

    common = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    configs = {
        "gpt2": lambda: GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
        ),
        "llama": lambda: LlamaConfig(**common),
        "qwen3": lambda: Qwen3Config(**common, head_dim=16),
        "sliding": lambda: MistralConfig(**common, sliding_window=4),
        "capped": lambda: Gemma2Config(**common, head_dim=16, final_logit_softcapping=0.5, query_pre_attn_scalar=16),
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[family](), dtype=torch.float32)
    with torch.no_grad():  # far from uniform, so that a leak would be seen
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, labels): some targets masked; the labels are not shifted yet."""
    random = np.random.default_rng(4)
    found = []
    for length, prompt in ((9, 4), (14, 0), (6, 3), (11, 10)):
        tokens = random.integers(3, VOCABULARY, length)
        labels = tokens.copy()
        labels[:prompt] = IGNORE_INDEX
        found.append((tokens, labels))
    return found


def packed(rows: list[list[int]], length: int) -> Batch:
    """Rows of the documents with the given numbers, padded."""
    shape = (len(rows), length)
    batch = Batch(
        np.zeros(shape, np.int64), np.full(shape, IGNORE_INDEX), np.zeros(shape, np.int64), np.full(shape, -1)
    )
    for row, members in enumerate(rows):
        start = 0
        for number in members:
            tokens, labels = documents()[number]
            end = start + len(tokens)
            batch.input_ids[row, start:end] = tokens
            batch.shift_labels[row, start : end - 1] = labels[1:]
            batch.position_ids[row, start:end] = np.arange(len(tokens))
            batch.document_ids[row, start:end] = number
            start = end
        batch.position_ids[row, start:] = np.arange(length - start)
    return batch


def alone(model: Any, number: int) -> tuple[float, int]:
    tokens, labels = documents()[number]
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0, :-1].double()
    targets = torch.from_numpy(labels[1:])
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return float(nll), int((targets != IGNORE_INDEX).sum())


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "sliding", "capped"])
@pytest.mark.parametrize("chunk_targets", [3, 1000])
def test_packed_documents_score_as_each_alone(family: str, chunk_targets: int) -> None:
    model = tiny(family).eval()
    batches = [packed([[0, 1], [3]], 24), packed([[2]], 8)]
    scores = score_documents(model, batches, CPU, chunk_targets=chunk_targets)
    assert scores.document_ids.tolist() == [0, 1, 2, 3]
    assert scores.nll_sum.dtype == np.float64
    for number, nll, targets in zip(scores.document_ids, scores.nll_sum, scores.target_tokens, strict=True):
        expected_nll, expected_targets = alone(model, int(number))
        assert targets == expected_targets
        assert nll / targets == pytest.approx(expected_nll / expected_targets, abs=5e-5)


def test_a_capped_head_is_not_mistaken_for_a_linear_one() -> None:
    """The shortcut would give another loss here: the family's own forward caps its logits."""
    model = tiny("capped").eval()
    hidden = model.get_decoder()(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).last_hidden_state
    shortcut = model.get_output_embeddings()(hidden)
    assert not torch.allclose(shortcut, model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits, atol=0.05)


def test_adapters_are_scored() -> None:
    from foretune.config.schema import LoraConfig
    from foretune.model.adapters import add_adapters

    model = add_adapters(tiny("llama"), LoraConfig(r=2), seed=0)
    before = score_documents(model, [packed([[0, 1]], 24)], CPU)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    after = score_documents(model, [packed([[0, 1]], 24)], CPU)
    expected = alone(model.eval(), 0)
    assert after.nll_sum[0] == pytest.approx(expected[0], rel=1e-5)
    assert abs(after.nll_sum[0] - before.nll_sum[0]) > 0.1


def test_the_mode_is_left_as_it_was_and_dropout_is_off() -> None:
    model = tiny("gpt2").train()
    first = score_documents(model, [packed([[0, 1]], 24)], CPU)
    second = score_documents(model, [packed([[0, 1]], 24)], CPU)
    assert model.training
    assert first.nll_sum.tolist() == second.nll_sum.tolist()


def test_rows_without_targets_give_nothing() -> None:
    batch = packed([[0]], 24)
    batch.shift_labels[:] = IGNORE_INDEX
    scores = score_documents(tiny("llama"), [batch], CPU)
    assert len(scores.document_ids) == len(scores.nll_sum) == len(scores.target_tokens) == 0
