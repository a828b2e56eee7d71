"""Laws of what is made of an engine's stream, and of what is said to the engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.serving.answers import DONE, Refusal, Rewriter, StopTrimmer, as_event, chunks_of, fold
from foretune.serving.dialects import DEFAULT_MAX_TOKENS, TransformersDialect, VllmDialect
from foretune.serving.model import ServedModel

FEW_LETTERS = st.text(alphabet="ab", max_size=12)


def cut(text: str | bytes, places: Iterable[int]) -> list[Any]:
    """Cut at the given places (any numbers; they are brought into range)."""
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(edges)]


def read(pieces: list[bytes]) -> list[dict[str, Any]]:
    async def stream() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def collect() -> list[dict[str, Any]]:
        return [chunk async for chunk in chunks_of(stream())]

    return asyncio.run(collect())


def trim(pieces: list[str], stops: list[str]) -> str:
    trimmer = StopTrimmer(stops)
    return "".join([trimmer.feed(piece) for piece in pieces]) + trimmer.flush()


def trimmed_letter_by_letter(text: str, stops: list[str]) -> str:
    """The definition: the answer ends when it first ends with a stop text, which is left out."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(FEW_LETTERS, st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
       st.lists(st.integers(0, 100), max_size=6))  # fmt: skip
def test_an_answer_ends_before_its_first_stop_text_however_it_is_cut(
    text: str, stops: list[str], places: list[int]
) -> None:
    assert trim(cut(text, places), stops) == trimmed_letter_by_letter(text, stops)


def test_only_what_may_become_a_stop_text_is_held_back() -> None:
    trimmer = StopTrimmer(["\n\nUser:"])
    assert trimmer.feed("Hello") == "Hello"
    assert trimmer.feed(" there\n") == " there"
    assert trimmer.feed("\nUs") == ""
    assert trimmer.feed("es of it") == "\n\nUses of it"
    assert trimmer.flush() == ""


@given(st.lists(st.text(max_size=8), max_size=5), st.lists(st.integers(0, 2000), max_size=8), st.booleans())
def test_events_are_the_same_wherever_the_network_cuts_them(texts: list[str], places: list[int], crlf: bool) -> None:
    texts = [*texts, "one\u2028two\x85three"]  # characters at which text would be split into lines
    chunks = [{"choices": [{"text": text}]} for text in texts if not _has_surrogate(text)]
    wire = b": a comment\n\n" + b"".join(as_event(chunk) for chunk in chunks) + DONE + as_event({"after": "the end"})
    if crlf:
        wire = wire.replace(b"\n", b"\r\n")
    assert read(cut(wire, places)) == chunks


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


@pytest.mark.parametrize(
    "event",
    [b'data: {"error": "bad"}', b'data: {"error": {"message": "bad"}}', b'data: {"error": "a "bad" one"}', b"data: 3"],
)
def test_an_error_in_a_stream_is_a_refusal(event: bytes) -> None:
    with pytest.raises(Refusal) as caught:
        read([event + b"\n\n"])
    assert caught.value.status == 502


@given(st.lists(st.text(max_size=5), max_size=5))
def test_folding_a_stream_joins_its_pieces(texts: list[str]) -> None:
    last = {"model": "m", "usage": {"total_tokens": 3}, "choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}
    whole = fold([{"model": "m", "choices": [{"index": 0, "text": text}]} for text in texts] + [last])
    assert whole["choices"][0]["text"] == "".join(texts)
    assert whole["usage"] == {"total_tokens": 3}
    assert whole["choices"][0]["finish_reason"] == "stop"


def test_folding_keeps_reasoning_and_tool_calls() -> None:
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    deltas: list[dict[str, Any]] = [
        {"role": "assistant"}, {"reasoning_content": "hm"}, {"reasoning_content": "m"}, {"content": "x"},
        {"tool_calls": [call]},
    ]  # fmt: skip
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    whole = fold(chunks)
    message = whole["choices"][0]["message"]
    assert whole["object"] == "chat.completion"
    assert message["reasoning_content"] == "hmm"
    assert message["content"] == "x"
    assert message["tool_calls"] == [{key: call[key] for key in ("id", "type", "function")}]
    assert whole["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("chunks", [[], [{"choices": [{"index": 0, "text": "half"}]}]])
def test_half_an_answer_is_no_answer(chunks: list[dict[str, Any]]) -> None:
    with pytest.raises(Refusal) as caught:
        fold(chunks)
    assert caught.value.status == 502


def test_the_held_tail_comes_with_the_last_chunk() -> None:
    rewriter = Rewriter("public", ["END"])
    first = rewriter.rewrite({"model": "m", "choices": [{"index": 0, "delta": {"content": "an E"}}]})
    last = rewriter.rewrite({"model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
    assert first == {"model": "public", "choices": [{"index": 0, "delta": {"content": "an "}}]}
    assert last["choices"][0]["delta"] == {"content": "E"}


# ── what is said to the engine ────────────────────────────────────────────────────────────────────────


def model_with(generation: dict[str, Any], context_length: int | None = 4096) -> ServedModel:
    return ServedModel(
        folder=Path("/nowhere"), name="tuned", tokenizer=None, context_length=context_length, vocab_size=9,
        generation=generation,
    )  # fmt: skip


def said(
    body: dict[str, Any], generation: dict[str, Any] | None = None, **model: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    full = {"model": "tuned", "prompt": "x", **body}
    told = TransformersDialect().translate(full, model_with(generation or {}, **model), prompt_tokens=10)
    return told, json.loads(told["generation_config"])


def test_the_models_stop_tokens_are_always_there() -> None:
    own = {"eos_token_id": [1, 2], "pad_token_id": 0, "_from_model_config": True, "transformers_version": "5.0"}
    for body in ({}, {"temperature": 0}, {"temperature": 0.7}, {"top_p": 0.5}):
        _, generation = said(body, own)
        assert generation["eos_token_id"] == [1, 2]
        assert "_from_model_config" not in generation
        assert "transformers_version" not in generation


def test_a_temperature_samples_over_the_whole_vocabulary() -> None:
    told, generation = said({"temperature": 0.7, "top_p": 0.9})
    assert generation == {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    assert "temperature" not in told
    assert said({"temperature": 1}, {"top_k": 20})[1]["top_k"] == 20, "the model's own choice stands"


def test_temperature_zero_is_greedy_and_silence_is_the_models_own_way() -> None:
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert said({"temperature": 0}, own)[1] == {"do_sample": False}
    assert said({}, own)[1] == own
    assert said({"top_p": 1}, {})[1] == {}
    assert said({"top_p": 0.5}, {"temperature": 0.6})[1] == {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.5,
        "top_k": 0,
    }


def test_the_length_of_an_answer() -> None:
    assert said({})[0]["max_tokens"] == DEFAULT_MAX_TOKENS
    assert said({}, {"max_new_tokens": 7})[0]["max_tokens"] == 7
    assert said({}, context_length=50)[0]["max_tokens"] == 40
    assert said({}, context_length=None)[0]["max_tokens"] == DEFAULT_MAX_TOKENS
    assert said({"max_tokens": 3})[0]["max_tokens"] == 3
    told, _ = said({"max_tokens": 3, "max_completion_tokens": 5})
    assert told["max_tokens"] == 5
    assert "max_completion_tokens" not in told


def test_nulls_inside_messages_and_unwanted_tools_are_left_out() -> None:
    messages = [{"role": "user", "content": "x", "tool_calls": None, "name": None}]
    told, _ = said({"messages": messages, "tools": [{"type": "function"}], "tool_choice": "none"})
    assert told["messages"] == [{"role": "user", "content": "x"}]
    assert "tools" not in told
    assert "tools" in said({"messages": messages, "tools": [{}], "tool_choice": "auto"})[0]


def test_vllm_is_told_everything_under_its_own_name_for_the_model() -> None:
    body = {"model": "tuned", "prompt": ["a", "b"], "n": 3, "logprobs": 2}
    VllmDialect().refuse(body)
    told = VllmDialect().translate(body, model_with({}), prompt_tokens=None)
    assert told == {**body, "model": "model"}
