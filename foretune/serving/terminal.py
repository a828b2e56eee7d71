"""A conversation in the terminal, in this process: no server, no port.

line ──/reset, /exit?──▶ history + line ──template──▶ tokens ──fits?──▶ generate in a thread ──▶ text as it comes
                            ▲                                                                       │
                            └───────────────────────── answer ──────────────────────────────────────┘

The model's words go to stdout and everything else to stderr, so that ``echo question | foretune chat RUN`` can be piped
on. Ctrl-C stops an answer, not the program; at the prompt it asks to leave with /exit.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from foretune.errors import UserError
from foretune.serving.model import QUIET, ServedModel, read_model

_HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer"


def chat(
    model_folder: Path,
    *,
    prompt: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    input_lines: Iterable[str] | None = None,
    output: TextIO | None = None,
    talk: TextIO | None = None,
) -> None:
    """Talk with a model.

    Args:
        model_folder: Hugging Face folder of a whole model.
        prompt: answer this one and return; None reads lines until the input ends.
        system: system message of every conversation.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 is greedy; None is the model's own way.
        input_lines: where lines come from; None asks at the terminal, or reads stdin where that is none.
        output: where answers go; None is stdout.
        talk: where everything else goes; None is stderr.

    Raises:
        UserError: a folder that can't be served, a chat template that is not the exported one, values out of range.
    """
    if max_new_tokens < 1:
        raise UserError("--max-new-tokens", max_new_tokens, "must be at least 1", "leave it out for 512")
    if temperature is not None and not 0 <= temperature <= 2:
        raise UserError("--temperature", temperature, "must be between 0 and 2", "0 is greedy, 1 samples as trained")
    output, talk = output or sys.stdout, talk or sys.stderr
    model = read_model(model_folder)
    conversation = Conversation(model, system=system, max_new_tokens=max_new_tokens, temperature=temperature)
    if not model.has_chat_template:
        print("This model has no chat template: each line is continued as plain text.", file=talk)
        if system is not None:
            raise UserError(
                "--system", system, "a model without a chat template takes no system message", "leave it out"
            )
    if prompt is not None:
        _answer(conversation, prompt, output, talk)
        return
    print(f"{model.name}: {_HELP}", file=talk, flush=True)
    for line in _lines(talk) if input_lines is None else input_lines:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                conversation.reset()
                print("(forgotten)", file=talk, flush=True)
            case text:
                _answer(conversation, text, output, talk)


class Conversation:
    """A model in memory and what was said so far."""

    def __init__(
        self, model: ServedModel, *, system: str | None, max_new_tokens: int, temperature: float | None
    ) -> None:
        self._served = model
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._max_new_tokens = max_new_tokens
        self._options = _sampling(temperature)
        stops = model.generation.get("eos_token_id") or []
        self._stop_tokens = set(stops if isinstance(stops, list) else [stops])
        self._turns: list[dict[str, str]] = []
        self._model = _load(model.folder)
        self.notes: list[str] = []  # what should be said about the last answer

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._turns = []

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece; closing the iterator early stops generating and keeps what was said.

        Raises:
            UserError: the line alone does not fit the model's context.
        """
        self.notes = []
        inputs, room = self._inputs(text)
        said: list[str] = []
        try:
            for piece in self._generate(inputs, room):
                said.append(piece)
                yield piece
        finally:
            if self._served.has_chat_template:
                self._turns += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(said)}]

    def _inputs(self, text: str) -> tuple[Any, int]:
        """Tokens of the conversation and the room left for an answer; forgets the oldest turns if they don't fit."""
        limit = self._served.context_length
        while True:
            inputs = self._encode(text)
            length = inputs["input_ids"].shape[-1]
            room = self._max_new_tokens if limit is None else min(self._max_new_tokens, limit - length)
            # An answer needs some room: a quarter of the context, or all that was asked for if that is less.
            if limit is None or room >= min(self._max_new_tokens, limit // 4):
                break
            if not self._turns:
                if room > 0:
                    break
                raise UserError(
                    "prompt", f"{text[:40]}…", f"has {length} tokens, and the model's context is {limit}", "shorten it"
                )
            self._turns = self._turns[2:]
            self.notes.append("the oldest turn was forgotten: the conversation is longer than the model's context")
        if length == 0:
            raise UserError("prompt", text, "is empty for this tokenizer", "write something")
        return inputs, room

    def _encode(self, text: str) -> Any:
        tokenizer = self._served.tokenizer
        if not self._served.has_chat_template:
            return tokenizer(text, return_tensors="pt", **QUIET)
        messages = [*self._system, *self._turns, {"role": "user", "content": text}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            tokenizer_kwargs=QUIET,
        )  # fmt: skip

    def _generate(self, inputs: Any, room: int) -> Iterator[str]:
        """Run `generate` in a thread and yield its text. Leaving the iterator stops it at the next token."""
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        streamer = TextIteratorStreamer(self._served.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopping = threading.Event()
        failures: list[BaseException] = []
        produced: list[int] = []  # the tokens of the answer

        def run() -> None:
            try:
                whole = self._model.generate(
                    **inputs.to(self._model.device),
                    streamer=streamer,
                    max_new_tokens=room,
                    stopping_criteria=StoppingCriteriaList(
                        [lambda ids, scores, **_: _all_rows(ids, stopping.is_set())]
                    ),
                    **self._options,
                )
                produced.extend(whole[0, inputs["input_ids"].shape[-1] :].tolist())
            except BaseException as error:  # handed to the reader, who would wait for ever otherwise
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=run, name="foretune-chat", daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stopping.set()
            thread.join()
        if failures:
            raise failures[0]
        if len(produced) >= room and produced[-1] not in self._stop_tokens:
            self.notes.append(f"the answer was cut at {room} tokens")


def _all_rows(ids: Any, value: bool) -> Any:
    """One verdict for every row of a batch, as transformers wants its stopping criteria."""
    import torch

    return torch.full((ids.shape[0],), value, dtype=torch.bool, device=ids.device)


def _sampling(temperature: float | None) -> dict[str, Any]:
    if temperature is None:
        return {}
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": float(temperature), "top_k": 0}


def _load(folder: Path) -> Any:
    """The weights on the best device here; on a CPU in fp32, which is exact and faster than emulated 16 bits."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = torch.float32 if device is None or device.type == "cpu" else "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            "model", str(folder), f"its weights can't be loaded: {reason}", "export the model again"
        ) from error
    return model.to(device).eval()


def _answer(conversation: Conversation, text: str, output: TextIO, talk: TextIO) -> None:
    """Print one answer as it comes. Ctrl-C ends the answer and nothing else."""
    pieces = conversation.answer(text)
    try:
        for piece in pieces:
            print(piece, end="", file=output, flush=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]  # a generator, seen as an iterator
        print(" (stopped)", end="", file=talk, flush=True)
    print(file=output, flush=True)
    for note in dict.fromkeys(conversation.notes):
        print(f"({note})", file=talk, flush=True)


def _lines(talk: TextIO) -> Iterator[str]:
    """Lines of the terminal, with editing and history where Python has readline, or of a pipe; ends with the input."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # importing it gives input() its line editing
    while True:
        try:
            print("> ", end="", file=talk, flush=True)
            yield input()
        except EOFError:
            print(file=talk)
            return
        except KeyboardInterrupt:
            print(f"\n({_HELP})", file=talk, flush=True)
