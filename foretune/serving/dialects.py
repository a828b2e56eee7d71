"""What each engine makes of OpenAI's parameters, and what must be said to it so that it does what was asked.

checked body ──`refuse`: what the engine would ignore──▶ ──`translate`──▶ the engine's body

`transformers serve` (5.23, read in cli/serving/*.py) ignores many parameters with one log line, decodes greedily
whatever the temperature unless the model's own generation configuration samples, and turns frequency_penalty into
another penalty. vLLM keeps OpenAI's meanings by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from foretune.serving.answers import Refusal
from foretune.serving.model import ServedModel

# The engine's own name of the one model: a link of this name in the engine's working folder. Clients never see it.
ENGINE_MODEL = "model"

# Length of an answer if neither the request nor the model says: the engine's own default.
DEFAULT_MAX_TOKENS = 1024

# Parameters that the engine ignores → the values that change nothing. Anything else would be silently wrong.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),  # not ignored: becomes repetition_penalty = 1 + value, which is something else
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "audio": (),
    "functions": (),
    "function_call": (),
    "reasoning_effort": (),
    "web_search_options": (),
    "generation_config": (),  # would replace the model's own, stop tokens and all
}
# Parameters without a bearing on the answer: book-keeping, or a hint for speed. usage always comes with a stream.
_BOOK_KEEPING = {"user", "metadata", "store", "service_tier", "stream_options", "prediction"}
_SAMPLING = {"temperature", "top_p", "max_tokens", "max_completion_tokens"}


class Dialect(Protocol):
    """How to talk to one engine."""

    always_streams: bool  # ask for a stream even if the client did not (see answers.py)
    keeps_stop_text: bool  # the engine leaves the stop text in its answers

    def refuse(self, body: dict[str, Any]) -> None:
        """Raise `Refusal` 400 for what this engine would ignore or get wrong."""

    def translate(self, body: Mapping[str, Any], model: ServedModel, *, prompt_tokens: int | None) -> dict[str, Any]:
        """Return the body that makes the engine do what the client asked for."""


class TransformersDialect:
    """`transformers serve`."""

    always_streams = True
    keeps_stop_text = True

    def refuse(self, body: dict[str, Any]) -> None:
        """Also takes a list of one prompt for the prompt itself, which older clients send."""
        for name, harmless in _WITHOUT_EFFECT.items():
            if name in body and body[name] not in harmless:
                raise Refusal(
                    400, f"{name} = {json.dumps(body[name])[:80]} is not supported by this server's engine",
                    param=name, code="unsupported_parameter",
                )  # fmt: skip
        prompt = body.get("prompt")
        if isinstance(prompt, list):
            if len(prompt) != 1 or not isinstance(prompt[0], str):
                raise Refusal(400, "this server's engine takes one prompt, as a text, per request", param="prompt")
            body["prompt"] = prompt[0]

    def translate(self, body: Mapping[str, Any], model: ServedModel, *, prompt_tokens: int | None) -> dict[str, Any]:
        assert prompt_tokens is not None, "refuse() leaves one prompt, which was counted"
        left_out = _BOOK_KEEPING | _SAMPLING | set(_WITHOUT_EFFECT)
        said = {key: value for key, value in body.items() if key not in left_out}
        if body.get("tool_choice") == "none":
            said.pop("tools", None)
        if "messages" in said:  # the engine takes a null for a value: "tool_calls": null would end as a 500
            said["messages"] = [
                {key: value for key, value in message.items() if value is not None} for message in said["messages"]
            ]
        said["model"] = ENGINE_MODEL
        said["stream"] = True
        said["max_tokens"] = self._answer_length(body, model, prompt_tokens)
        said["generation_config"] = json.dumps(self._generation(body, model.generation))
        return said

    @staticmethod
    def _answer_length(body: Mapping[str, Any], model: ServedModel, prompt_tokens: int) -> int:
        asked = body.get("max_completion_tokens", body.get("max_tokens"))
        if asked is not None:
            return int(asked)
        default = int(model.generation.get("max_new_tokens") or DEFAULT_MAX_TOKENS)
        return default if model.context_length is None else min(default, model.context_length - prompt_tokens)

    @staticmethod
    def _generation(body: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """The model's generation configuration with the request's sampling in it.

        A request that names a temperature is sampled at it, over the whole vocabulary as OpenAI means it (transformers
        would otherwise cut at its own top_k of 50); temperature 0 is greedy; no word leaves the model's own way.
        """
        generation = {
            key: value for key, value in own.items() if key not in {"_from_model_config", "transformers_version"}
        }
        temperature, top_p = body.get("temperature"), body.get("top_p")
        if temperature == 0:
            for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
                generation.pop(name, None)
            return generation | {"do_sample": False}
        if temperature is None and top_p in {None, 1}:
            return generation
        generation.setdefault("top_k", 0)
        generation["do_sample"] = True
        generation["temperature"] = float(
            temperature if temperature is not None else generation.get("temperature", 1.0)
        )
        if top_p is not None:
            generation["top_p"] = float(top_p)
        return generation


class VllmDialect:
    """vLLM, which keeps OpenAI's meanings and refuses what it lacks with a 400 of its own."""

    always_streams = False  # it stops generating when the connection closes, stream or not
    keeps_stop_text = False

    def refuse(self, body: dict[str, Any]) -> None:
        """Nothing: vLLM answers for itself."""

    def translate(self, body: Mapping[str, Any], model: ServedModel, *, prompt_tokens: int | None) -> dict[str, Any]:
        return {**body, "model": ENGINE_MODEL}
