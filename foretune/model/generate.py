"""A model answers prompts, many at a time, always with its likeliest token.

    prompts (lists of messages) ──chat template──▶ token ids ──sort by length──▶ left-padded batches ──generate──▶ text

In: the model and tokenizer of one folder.  Out: one text per prompt, in the order of the prompts. Greedy, so that the
same weights give the same text. Generation itself is transformers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = dict[str, str]


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Answer each prompt greedily.

    Args:
        model: a causal language model, on any device; left in the mode (train or eval) that it was in.
        tokenizer: with a chat template; without one the contents are joined as plain text, to be continued.
        prompts: conversations that end where the answer begins; each message has ``role`` and ``content``.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts per forward pass. Prompts are batched by length, so that padding stays small.

    Returns:
        The answers without special tokens, stripped of surrounding white space, in the order of `prompts`.
    """
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    return continue_tokens(model, tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size)


def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Go on greedily from prompts that are token ids already. Otherwise as `generate_answers`."""
    import torch

    encoded = [list(prompt) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    answers = [""] * len(encoded)
    # generate() fills what a caller's configuration leaves at its default from the model's own (sampling, penalties):
    # only replacing the model's own makes it greedy for certain. A peft wrapper generates with its base model's.
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    was_training, kept = core.training, core.generation_config
    model.eval()
    core.generation_config = _greedy(core, tokenizer, max_new_tokens)
    try:
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                texts = _answer_batch(core, tokenizer, [encoded[index] for index in indices])
                for index, text in zip(indices, texts, strict=True):
                    answers[index] = text
    finally:
        core.generation_config = kept
        model.train(was_training)
    return answers


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> list[int]:
    text = "\n".join(message["content"] for message in prompt)
    templated = tokenizer.chat_template is not None
    if templated:
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=not templated)["input_ids"]  # a template writes its own
    return ids


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = configured if isinstance(configured, list) else [configured]
    eos = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos[0] if eos else 0)
    return GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos or None, pad_token_id=pad)


def _answer_batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: list[list[int]]) -> list[str]:
    """Answers of one batch. Padded on the left: generation goes on from the last column."""
    import torch

    length = max(len(ids) for ids in batch)
    pad = model.generation_config.pad_token_id
    input_ids = torch.tensor([[pad] * (length - len(ids)) + ids for ids in batch], device=model.device)
    attention_mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in batch], device=model.device)
    output = model.generate(input_ids=input_ids, attention_mask=attention_mask)
    return [text.strip() for text in tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)]
