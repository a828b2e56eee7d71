"""From the engine's server-sent events to what a client gets: one name for the model, no stop text, errors said.

bytes ──cut at blank lines──▶ `chunks_of` ──`Rewriter`──▶ chunk ─┬─▶ `as_event`: streamed on at once
                                                                └─▶ `fold`: one object for a client that does not stream

A client that does not stream is answered from a stream too, because `transformers serve` goes on generating for a
client that left unless its answer is a stream, and it generates for one client at a time.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

DONE = b"data: [DONE]\n\n"


class Refusal(Exception):
    """An answer that is an error, in OpenAI's format.

    Args:
        status: HTTP status.
        message: what is wrong, for a person.
        param: the field of the request that is at fault.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def as_object(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def as_event(chunk: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


async def chunks_of(stream: AsyncIterable[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON of each event as soon as its last byte is there; ends at ``[DONE]`` or with the stream.

    Events are cut as bytes: splitting text at "lines" would also cut at U+2028 inside an answer.

    Raises:
        Refusal: 502, when the engine reports an error inside its stream.
    """
    waiting = b""
    async for piece in stream:
        waiting = (waiting + piece).replace(b"\r\n", b"\n")
        *events, waiting = waiting.split(b"\n\n")
        for event in events:
            data = b"\n".join(line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:"))
            if data == b"[DONE]":
                return
            if data:
                yield _parse(data)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        # transformers 5.23 puts a message between quotes without escaping it, so an error may be no JSON.
        raise Refusal(502, f"the engine failed: {data.decode(errors='replace')}", code="engine_error") from None
    if not isinstance(chunk, dict) or "error" in chunk:
        error = chunk.get("error") if isinstance(chunk, dict) else chunk
        message = error.get("message") if isinstance(error, dict) else error
        raise Refusal(502, f"the engine failed: {message}", code="engine_error")
    return chunk


class StopTrimmer:
    """Cuts an answer before the first stop text. transformers leaves the stop text in; OpenAI's clients expect it out.

    Only the longest tail that could still become a stop text is held back, so a stream stays a stream.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._stopped = False

    def feed(self, text: str) -> str:
        """Take new text, return what can be shown by now."""
        if self._stopped:
            return ""
        text = self._held + text
        # The stop text that is complete first, and of those the one that began first: no cutting into pieces, by the
        # network or by tokens, may change the answer.
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stops if stop in text]
        if found:
            self._held, self._stopped = "", True
            return text[: min(found)[1]]
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back in vain; the answer has ended."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that is a proper beginning of `stop`."""
        return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class Rewriter:
    """Makes the engine's chunks ours: the public model name, and answers without their stop text.

    Args:
        model_name: what clients call the model.
        stops: stop texts that the engine leaves in; empty for an engine that cuts them itself.
    """

    def __init__(self, model_name: str, stops: Sequence[str] = ()) -> None:
        self._model_name = model_name
        self._trimmer = StopTrimmer(stops) if stops else None

    def rewrite(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """Rewrite one chunk, or one whole answer of an engine that cuts stop texts itself, in place; return it."""
        if "model" in chunk:
            chunk["model"] = self._model_name
        if self._trimmer is None:
            return chunk
        for choice in chunk.get("choices", []):
            holder, key = (choice["delta"], "content") if "delta" in choice else (choice, "text")
            text = self._trimmer.feed(holder.get(key) or "")
            if choice.get("finish_reason"):
                text += self._trimmer.flush()
            if text or key in holder:
                holder[key] = text
        return chunk


def fold(chunks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the chunks of a stream with one choice into the answer that a client gets who does not stream."""
    whole: dict[str, Any] = {}
    choice: dict[str, Any] = {"index": 0, "finish_reason": None, "logprobs": None}
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    is_chat = False
    for chunk in chunks:
        whole.update({key: value for key, value in chunk.items() if key != "choices"})
        for part in chunk["choices"]:
            choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
            if "delta" not in part:
                choice["text"] = choice.get("text", "") + part.get("text", "")
                continue
            is_chat = True
            delta = part["delta"]
            message["content"] += delta.get("content") or ""
            if delta.get("reasoning_content"):
                message["reasoning_content"] = message.get("reasoning_content", "") + delta["reasoning_content"]
            for call in delta.get("tool_calls") or []:  # the engine sends each call whole, in one chunk
                message.setdefault("tool_calls", []).append({key: call[key] for key in call if key != "index"})
    if choice["finish_reason"] is None:
        raise Refusal(502, "the engine ended its answer half-way", code="engine_error")
    if is_chat:
        choice["message"] = message
        whole["object"] = "chat.completion"
    whole["choices"] = [choice]
    return whole
