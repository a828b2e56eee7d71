"""From the bytes of a request to a body that the engine can be trusted with, or to a refusal with a reason.

bytes ──JSON──▶ object ──types and ranges──▶ checked body ──this model?──▶ ──tokens fit?──▶ ──engine's dialect──▶ body

Engines answer a bad parameter with a bare 500, or ignore it without a word. So types and ranges are checked here, what
the engine would ignore is refused by name, and an answer never means something else than was asked.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foretune.serving.answers import Refusal
from foretune.serving.model import ServedModel

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
CHAT: Endpoint = "/v1/chat/completions"
TEXT: Endpoint = "/v1/completions"

Text = Annotated[str, Field(min_length=1)]


class _Checked(BaseModel):
    """OpenAI's ranges. Further fields pass on to the engine, which knows its own."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    model: Text
    stream: bool | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None


class _Part(BaseModel):
    """A piece of a message. Models here read text only; an engine would drop a picture without a word."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    role: Text
    content: str | list[_Part] | None = None


class _ChatBody(_Checked):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class _TextBody(_Checked):
    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None


def parse_body(content: bytes) -> dict[str, Any]:
    """Read one JSON object. Raises `Refusal` 400 for anything else, lone surrogates and NaN included."""

    def no_constant(name: str) -> float:
        raise ValueError(f"{name} is no JSON")

    try:
        body = json.loads(content, parse_constant=no_constant)
        # Half a surrogate pair is legal in JSON and can't be encoded: tokenizers fail on it deep inside.
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError
        raise Refusal(400, f"the request body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refusal(400, f"the request body must be a JSON object, not a {type(body).__name__}")
    return {key: value for key, value in body.items() if value is not None}  # null means: not given


def check_body(endpoint: Endpoint, body: dict[str, Any], model: ServedModel) -> None:
    """Check types, ranges and the model's name. Raises `Refusal` 400, or 404 for another model."""
    try:
        (_ChatBody if endpoint == CHAT else _TextBody).model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        raise Refusal(400, f"{param}: {first['msg']}", param=param) from None
    if body["model"] != model.name:
        raise Refusal(
            404, f"the model {body['model']!r} does not exist here; this server has {model.name!r}",
            param="model", code="model_not_found",
        )  # fmt: skip
    if endpoint == CHAT and not model.has_chat_template:
        raise Refusal(
            400, f"{model.name!r} has no chat template; ask {TEXT} with a plain prompt instead",
            param="messages", code="no_chat_template",
        )  # fmt: skip
    if "chat_template" in body:
        raise Refusal(400, "the chat template is the trained one and can't be replaced", param="chat_template")
    # Any argument of apply_chat_template would be accepted there, `chat_template` itself and `tokenize` among them.
    reserved = set(inspect.signature(model.tokenizer.apply_chat_template).parameters)
    for name in body.get("chat_template_kwargs", {}):
        if name in reserved or not name.isidentifier():
            raise Refusal(400, f"{name!r} can't be set by a request", param=f"chat_template_kwargs.{name}")
    for key in body.get("logit_bias", {}):
        if not key.isdecimal() or int(key) >= model.vocab_size:
            raise Refusal(400, f"{key!r} is no token of this model", param="logit_bias")


def count_prompt_tokens(endpoint: Endpoint, body: dict[str, Any], model: ServedModel) -> int | None:
    """Tokens of the prompt as the engine will see it; None where only the engine can tell (a list of prompts).

    Raises:
        Refusal: 400 if the template refuses the messages or if nothing is left of the prompt.
    """
    if endpoint == TEXT:
        prompt = body["prompt"]
        if not isinstance(prompt, str):
            return None
        count = model.count_text_tokens(prompt)
        if count == 0:
            raise Refusal(400, "the prompt is empty", param="prompt")
        return count
    options = body.get("chat_template_kwargs", {})
    try:
        messages = [_as_template_message(message) for message in body["messages"]]
        return model.count_chat_tokens(messages, tools=body.get("tools"), template_options=options)
    except Exception as error:  # a template is a program of the model's author: it raises what it likes
        reason = str(error).strip() or type(error).__name__
        raise Refusal(400, f"the chat template refuses these messages: {reason}", param="messages") from None


def check_length(body: Mapping[str, Any], *, prompt_tokens: int | None, context_length: int | None) -> None:
    """Refuse what does not fit. Past its positions a model talks nonsense, or takes a GPU's process down with it."""
    if prompt_tokens is None or context_length is None:
        return
    asked = body.get("max_completion_tokens", body.get("max_tokens"))
    if prompt_tokens + (asked or 1) > context_length:
        rest = "" if asked is None else f" and {asked} tokens of answer were asked for"
        raise Refusal(
            400, f"this model's context is {context_length} tokens; the prompt has {prompt_tokens}{rest}",
            param="messages" if "messages" in body else "prompt", code="context_length_exceeded",
        )  # fmt: skip


def _as_template_message(message: dict[str, Any]) -> dict[str, Any]:
    """The message as `transformers serve` hands it to the template: parts joined by a blank, calls as objects."""
    calls = message.get("tool_calls")
    content = "" if calls else (message.get("content") or "")
    text = content if isinstance(content, str) else " ".join(part["text"] for part in content)
    parsed: dict[str, Any] = {"role": message["role"], "content": text}
    if message.get("tool_call_id") is not None:
        parsed["tool_call_id"] = message["tool_call_id"]
    if calls:
        parsed["tool_calls"] = copy.deepcopy(calls)
        for call in parsed["tool_calls"]:
            function = call.get("function") or call
            if isinstance(function["arguments"], str):
                function["arguments"] = json.loads(function["arguments"])
    return parsed
