"""Greedy answers in batches: the same text whatever the batch, whatever the model's own generation settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from foretune.model.generate import generate_answers

STORIES = Path(__file__).parents[2] / "models" / "stories260K"
STARTS = [
    "Once upon a time",
    "Lily had a big red ball. She",
    "Tom",
    "The dog and the cat were friends. One day, they went",
    "A bird",
]
PROMPTS = [[{"role": "user", "content": start}] for start in STARTS]


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(STORIES)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(STORIES)


def test_a_batch_answers_as_each_alone(model: Any, tokenizer: Any) -> None:
    alone = [
        answer
        for prompt in PROMPTS
        for answer in generate_answers(model, tokenizer, [prompt], max_new_tokens=24, batch_size=1)
    ]
    assert len(set(alone)) == len(PROMPTS)
    for size in (2, 5, 64):
        assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=24, batch_size=size) == alone
    backwards = generate_answers(model, tokenizer, PROMPTS[::-1], max_new_tokens=24, batch_size=2)
    assert backwards == alone[::-1]


def test_the_models_own_settings_do_not_matter_and_stay(model: Any, tokenizer: Any) -> None:
    plain = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=16, batch_size=4)
    own = GenerationConfig(do_sample=True, temperature=5.0, top_k=50, repetition_penalty=3.0, num_beams=2)
    kept = model.generation_config
    model.generation_config = own
    model.train()
    try:
        assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=16, batch_size=4) == plain
        assert model.generation_config is own
        assert model.training
    finally:
        model.generation_config = kept
        model.eval()


def test_a_template_is_applied_and_its_special_tokens_are_not_doubled(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    seen: list[list[int]] = []
    inner = model.generate

    def spy(**inputs: Any) -> Any:
        seen.extend(inputs["input_ids"].tolist())
        return inner(**inputs)

    model.generate = spy
    try:
        generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=2, batch_size=1)
    finally:
        del model.generate
    assert seen[0].count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(seen[0], skip_special_tokens=True) == STARTS[0]


def test_it_stops_at_the_end_token_and_at_the_limit(model: Any, tokenizer: Any) -> None:
    whole = generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=40, batch_size=1)[0]
    cut = generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=5, batch_size=1)[0]
    assert whole.startswith(cut)
    assert 0 < len(cut) < len(whole)
    end = tokenizer.encode(whole, add_special_tokens=False)[6]
    kept = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=[end])
    try:
        stopped = generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=40, batch_size=1)[0]
    finally:
        model.generation_config = kept
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)


def test_a_model_with_adapters_answers_with_them(model: Any, tokenizer: Any) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    plain = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=30, batch_size=5)
    fresh = AutoModelForCausalLM.from_pretrained(STORIES)
    wrapped = get_peft_model(fresh, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True))
    assert generate_answers(wrapped, tokenizer, PROMPTS, max_new_tokens=30, batch_size=5) == plain
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    assert generate_answers(wrapped, tokenizer, PROMPTS, max_new_tokens=30, batch_size=5) != plain
