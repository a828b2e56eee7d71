"""Conversations as text, and which characters of it are the assistant's.

In: a tokenizer and a `Conversation`.  Out: `Rendered`: the text, the spans to learn, and whether an end of sequence is
missing.

    messages ──render──▶ full text
    turn i:  start = where render(messages[:i], with generation prompt) ends: what inference is given
             end   = after the closing token that the template ends the turn with (<|im_end|>, </s>, ...)

Every start and end is checked against the full text. Templates that write earlier turns differently (Qwen3 drops the
thinking of all but the last) fail the simple check; then a turn's content is found by rendering a mark in its place.
What can't be found exactly is refused with a reason, never guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from foretune.data.formats import Conversation, Dropped
from foretune.errors import UserError

Origin = Literal["tokenizer", "fallback", "file", "none"]

#: Headings that any tokenizer can write; every answer ends with the tokenizer's own end of sequence.
_FALLBACK = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] + '\n\n' }}"
    "{%- elif message['role'] == 'user' -%}{{ '### User:\n' + message['content'] + '\n\n' }}"
    "{%- elif message['role'] == 'tool' -%}{{ '### Tool:\n' + message['content'] + '\n\n' }}"
    "{%- else -%}{{ '### Assistant:\n' + message['content'] }}"
    "{%- if message['tool_calls'] -%}{{ message['tool_calls'] | tojson }}{%- endif -%}"
    "{{ eos_token + '\n\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Assistant:\n' }}{%- endif -%}"
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_MARK = "\u2020foretune mark\u2020"
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, up to the end of its last answer.

    `spans` are ``(start, end)`` in characters, ascending, of what is learned; `append_eos`: the text ends without the
    tokenizer's end-of-sequence token, which must follow as a target.
    """

    text: str
    spans: list[tuple[int, int]]
    append_eos: bool


@dataclass
class ChatTemplate:
    """A tokenizer's way to write conversations. Build it with `choose_template`."""

    tokenizer: Any
    origin: Origin
    stop_token_ids: list[int] = field(default_factory=list)
    has_markers: bool = False
    merges_system: bool = False  # the template has no system role: its text goes before the first user message's
    closing: str = ""  # what ends an answer, e.g. "<|im_end|>"
    special: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def render(self, conversation: Conversation) -> Rendered | Dropped:
        """Write a conversation and find what is learned of it."""
        from jinja2.exceptions import TemplateError

        messages = _merge_system(conversation.messages) if self.merges_system else conversation.messages
        learned = conversation.learned[len(conversation.messages) - len(messages) :]
        try:
            return self._render(messages, learned, conversation.tools)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            return Dropped(f"the chat template refuses it: {' '.join(str(error).split())}"[:120])

    def _render(
        self, messages: list[dict[str, Any]], learned: list[bool], tools: list[dict[str, Any]] | None
    ) -> Rendered | Dropped:
        full = self.write(messages, tools)
        spans: list[tuple[int, int]] = []
        marked = self._marked_spans(messages, tools) if self.has_markers else None
        turn = -1
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            turn += 1
            if not learned[i]:
                continue
            span = self._span(full, messages, i, tools) if marked is None else marked[turn]
            if span is None or not (spans[-1][1] if spans else 0) <= span[0] < span[1]:
                return Dropped("its answers can't be told apart in the chat template's text")
            spans.append((span[0], self._with_closing(full, span[1])))
        text = full[: spans[-1][1]]
        eos = self.tokenizer.eos_token
        return Rendered(text, spans, append_eos=not text.endswith(eos))

    def write(self, messages: list[dict[str, Any]], tools: Any = None, *, ask: bool = False) -> str:
        """The text of messages; `ask` adds what makes the model answer (the generation prompt)."""
        return str(self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask))

    def _span(self, full: str, messages: list[dict[str, Any]], i: int, tools: Any) -> tuple[int, int] | None:
        start = self._start(full, messages, i, tools)
        end = self._end(full, messages, i, tools, start) if start is not None else None
        return None if start is None or end is None else (start, end)

    def _start(self, full: str, messages: list[dict[str, Any]], i: int, tools: Any) -> int | None:
        prompt = self.try_write(messages[:i], tools, ask=True) if i else None
        if prompt is not None and full.startswith(prompt):
            return len(prompt)
        region = self._content(full, messages, i, tools)
        return region[0] if region else None

    def _end(self, full: str, messages: list[dict[str, Any]], i: int, tools: Any, start: int) -> int | None:
        last = i == len(messages) - 1
        through = full if last else self.try_write(messages[: i + 1], tools)
        if through is not None and full.startswith(through) and len(through) > start:
            body = through.rstrip()
            if self.closing and body.endswith(self.closing):
                return len(body)
            if last and not self.closing and not messages[i]["content"].strip():
                return len(body)
        region = self._content(full, messages, i, tools)
        if region and region[1] >= start:
            return region[1]
        # An answer that calls a tool has no content to mark: it ends where the next special closing token stands.
        if self.closing in self.special and self.closing not in messages[i]["content"]:
            found = full.find(self.closing, start)
            return found + len(self.closing) if found >= 0 else None
        return None

    def _with_closing(self, full: str, end: int) -> int:
        """An end moved past the closing that follows it, if one does."""
        if self.closing and not full[:end].endswith(self.closing):
            rest = full[end:]
            blank = len(rest) - len(rest.lstrip())
            if rest.startswith(self.closing):
                return end + len(self.closing)
            if rest[blank:].startswith(self.closing):
                return end + blank + len(self.closing)
        return end

    def _content(self, full: str, messages: list[dict[str, Any]], i: int, tools: Any) -> tuple[int, int] | None:
        """Where the content of message i stands in the full text: found by rendering a mark in its place."""
        if not messages[i]["content"].strip():
            return None
        marked = self.try_write([*messages[:i], {**messages[i], "content": _MARK}, *messages[i + 1 :]], tools)
        if marked is None or marked.count(_MARK) != 1:
            return None
        left, right = marked.split(_MARK)
        if full.startswith(left) and full.endswith(right) and len(left) + len(right) < len(full):
            return len(left), len(full) - len(right)
        return None

    def try_write(self, messages: list[dict[str, Any]], tools: Any = None, *, ask: bool = False) -> str | None:
        """The text of messages, or None if the template refuses them."""
        from jinja2.exceptions import TemplateError

        try:
            return self.write(messages, tools, ask=ask)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
            return None

    def _marked_spans(self, messages: list[dict[str, Any]], tools: Any) -> list[tuple[int, int]] | None:
        """Spans between the template's own ``{% generation %}`` markers, if it marks every assistant turn."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(tools=tools)
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        found = [(int(start), int(end)) for start, end in spans[0]]
        turns = sum(message["role"] == "assistant" for message in messages)
        return found if len(found) == turns and texts[0] == self.write(messages, tools) else None


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder.

    Raises:
        UserError: (field ``model``) there is none, it can't be loaded, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        custom = trust_remote_code and any(folder.glob("*.py"))
        if not custom:
            mend = "put the tokenizer's files (tokenizer.json, tokenizer_config.json) into the model's folder"
            raise UserError("model", str(folder), "has no tokenizer", mend)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a damaged file raises, from several libraries
        problem = f"its tokenizer can't be loaded ({' '.join(str(error).split())[:300]})"
        raise UserError("model", str(folder), problem, "download the tokenizer's files again") from error
    if tokenizer.eos_token_id is None:
        mend = "set eos_token in the model's tokenizer_config.json"
        raise UserError(
            "model", str(folder), "its tokenizer has no end-of-sequence token, so no answer could end", mend
        )
    return tokenizer


def choose_template(tokenizer: Any, *, file: str | None, needed: bool) -> ChatTemplate:
    """Decide on the template and set it on the tokenizer: a given file, the tokenizer's own, or the stated fallback.

    Args:
        file: path of a Jinja template, or None. needed: whether any data is a conversation.

    Raises:
        UserError: the file is missing or is no usable template; the tokenizer has no end-of-sequence token.
    """
    origin: Origin = "tokenizer" if tokenizer.chat_template else "none"
    if file is not None:
        tokenizer.chat_template, origin = _read_template(file), "file"
    elif origin == "none" and needed:
        tokenizer.chat_template, origin = _fallback_for(tokenizer), "fallback"
    template = ChatTemplate(tokenizer, origin, [int(tokenizer.eos_token_id)])
    if not needed:
        return template
    if origin == "fallback":
        template.notes.append(
            "the tokenizer has no chat template: conversations are written as ### User: / ### Assistant:"
        )
    template.special = sorted(
        {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len
    )
    template.special += [token for token in tokenizer.all_special_tokens if token not in template.special]
    _probe(template, file)
    template.has_markers = _MARKERS.search(str(tokenizer.get_chat_template())) is not None
    return template


def _read_template(file: str) -> str:
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError("data.chat_template", file, "there is no such file", "give the path of a Jinja chat template")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError("data.chat_template", file, "is not UTF-8 text", "save the template as UTF-8") from None


def _fallback_for(tokenizer: Any) -> str:
    """The fallback, with the beginning-of-sequence token where the tokenizer itself would write it before a text."""
    ids = tokenizer("a").input_ids
    starts_with_bos = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    return ("{{- bos_token -}}" if starts_with_bos else "") + _FALLBACK


def _probe(template: ChatTemplate, file: str | None) -> None:
    """Learn from small conversations whether the template works, knows a system role, and how it closes an answer."""
    from jinja2.exceptions import TemplateError

    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}
    try:
        text = template.write([user, answer])
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        where, value = ("data.chat_template", file) if file else ("model", template.tokenizer.name_or_path)
        problem = f"its chat template can't write a question and an answer ({' '.join(str(error).split())[:200]})"
        raise UserError(where, value, problem, "give a working template with data.chat_template") from None
    if text.count(_MARK) != 1:
        where, value = ("data.chat_template", file) if file else ("model", template.tokenizer.name_or_path)
        problem = "its chat template does not write the answer as it is"
        raise UserError(where, value, problem, "give another template with data.chat_template")
    template.closing = _closing(text.partition(_MARK)[2], template.special)
    ids = template.tokenizer(template.closing, add_special_tokens=False).input_ids if template.closing else []
    if ids and template.closing in template.special and ids[0] not in template.stop_token_ids:
        template.stop_token_ids.append(ids[0])
    with_system = template.try_write([{"role": "system", "content": "b\u2020c"}, user, answer])
    if with_system is None or "b\u2020c" not in with_system:
        template.merges_system = True
        template.notes.append("the chat template has no system role: system texts go before the first user message")
    asked = template.try_write([user], ask=True)
    if asked is not None and not text.startswith(asked):
        template.notes.append(
            f"the chat template asks for an answer with {asked[-40:]!r}, but does not write answers so: "
            "inference will begin with text that training did not have"
        )
    longer = template.try_write([user, answer, user, answer])
    if longer is not None and not longer.startswith(text.rstrip()):
        template.notes.append(
            "the chat template writes earlier answers differently; they are learned as it writes them"
        )


def _closing(tail: str, special: list[str]) -> str:
    """What ends an answer: all up to the first special token after it; without one, the text that follows it."""
    found = [(tail.find(token), len(token)) for token in special if token in tail]
    if found:
        at, length = min(found, key=lambda item: (item[0], -item[1]))
        return tail[: at + length].lstrip()
    return tail.strip()


def _merge_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A system message joined to the user message after it."""
    if messages[0]["role"] != "system" or len(messages) < 2 or messages[1]["role"] != "user":
        return messages
    joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": joined}, *messages[2:]]


def stop_token_ids(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's end of sequence, and what its chat template ends a turn with.

    A base model's end-of-text token is often another one than its template's end of turn; whoever generates and stops
    at the former only would let the model talk on in the user's name.
    """
    try:
        return choose_template(tokenizer, file=None, needed=tokenizer.chat_template is not None).stop_token_ids
    except UserError:  # a template that can't write a conversation: `prepare` would have refused to train with it
        return [int(tokenizer.eos_token_id)]
