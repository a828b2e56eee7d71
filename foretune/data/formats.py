"""The forms rows come in, and the two forms they leave in: a text, or a conversation.

In: a row (a mapping of columns).  Out: `Text`, `Conversation` or `Dropped` with its reason.

    columns ──detect──▶ form ──normalise──▶ text                           (form text)
                                        └──▶ [{role, content, ...}, ...]   (all other forms)

Forms: text; prompt/completion; instruction/input/output; question/answer; messages (OpenAI); conversations (ShareGPT).
Preference data (chosen/rejected) is told apart and refused: it is for another kind of training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from foretune.errors import UserError

Row = Mapping[str, Any]

_ANSWERS = ("output", "response", "completion", "answer")
#: form → (columns one of which asks, columns one of which answers). In order of preference where several fit.
_PAIRS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "instruction": (("instruction",), _ANSWERS),
    "prompt_completion": (("prompt",), ("completion", "response", "output")),
    "question_answer": (("question",), ("answer", "response")),
}
_LISTS = {"messages": ("messages",), "conversations": ("conversations", "conversation")}
_PREFERENCE = ({"chosen", "rejected"}, {"prompt", "completion", "label"}, {"messages", "label"}, {"kto_tag"})
KNOWN_FORMS = (
    "text: text; prompt_completion: prompt, completion (or response, output); "
    "instruction: instruction, [input], output (or response, completion, answer); "
    "question_answer: question, answer (or response); "
    "messages: messages [{role, content}]; conversations: conversations [{from, value}]"
)
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_KEPT_KEYS = ("name", "tool_call_id", "reasoning_content", "thinking")


@dataclass(frozen=True, slots=True)
class Text:
    """A plain text, learned from its second token to its end of sequence."""

    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates take them; the last is an assistant's. `learned` tells which messages are targets."""

    messages: list[dict[str, Any]]
    learned: list[bool]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that can't be used, and the reason it is counted under."""

    reason: str


@dataclass(frozen=True, slots=True)
class _Malformed(Exception):
    reason: str


def detect(columns: Iterable[str], *, wanted: str, field: str, path: str) -> str:
    """Tell the form of rows from their columns, or check the form that was asked for.

    Args:
        columns: names seen in the rows.
        wanted: ``auto`` or the name of a form.
        field: dotted key of the source, for errors. path: where the rows come from, for errors.

    Raises:
        UserError: preference data, no form fits, or several do; names the columns seen and the forms known.
    """
    names = set(columns)
    seen = f"its columns are {', '.join(sorted(names)) or '(none)'}"
    for marks in _PREFERENCE:
        if marks <= names and wanted == "auto":
            raise UserError(
                field,
                path,
                f"holds preferences (columns {', '.join(sorted(marks))}), made for training by comparison",
                "write the preferred answers alone, as messages, prompt/completion or question/answer",
            )
    fitting = [form for form, keys in _LISTS.items() if names & set(keys)]
    fitting += [form for form, (asks, answers) in _PAIRS.items() if names & set(asks) and names & set(answers)]
    if "text" in names and (
        not fitting or wanted == "text"
    ):  # beside another form, text is its rendering (Alpaca ships so)
        fitting = ["text"]
    if wanted != "auto":
        if wanted not in fitting:
            raise UserError(
                field,
                path,
                f"is not of the form {wanted!r}: {seen}",
                f"rename columns or set the format; forms are {KNOWN_FORMS}",
            )
        return wanted
    if len(fitting) != 1:
        problem = f"fits several forms ({', '.join(fitting)})" if fitting else "has a form that is not known"
        mend = (
            f"set data.format to one of {', '.join(fitting)}"
            if fitting
            else f"rename columns to one of the forms: {KNOWN_FORMS}"
        )
        raise UserError(field, path, f"{problem}: {seen}", mend)
    return fitting[0]


def normalise(row: object, form: str, *, system: str | None = None) -> Text | Conversation | Dropped:
    """Bring one row of a known form to a text or a conversation; one without a system message gets `system`."""
    try:
        if isinstance(row, str) and form == "text":
            row = {"text": row}
        if not isinstance(row, Mapping):
            raise _Malformed("row is not an object")
        if form == "text":
            return Text(_text(row, ("text",)))
        messages = _list_messages(row, _LISTS[form]) if form in _LISTS else _pair_messages(row, form)
        return _conversation(messages, row, system)
    except _Malformed as malformed:
        return Dropped(malformed.reason)


# ── pairs: something asked, something answered ──────────────────────────────────────────────────────────────────────


def _pair_messages(row: Row, form: str) -> list[dict[str, Any]]:
    asks, answers = _PAIRS[form]
    ask = next((row[key] for key in asks if row.get(key) is not None), None)
    answer = next((row[key] for key in answers if row.get(key) is not None), None)
    if isinstance(ask, list) or isinstance(answer, list):  # a conversation cut in two, as TRL writes it
        if not (isinstance(ask, list) and isinstance(answer, list)):
            raise _Malformed(f"{asks[0]} and {answers[0]} are not of one kind")
        return [_message(item) for item in (*ask, *answer)]
    messages: list[dict[str, Any]] = []
    history = row.get("history") or []
    for turn in history if isinstance(history, list) else [history]:  # earlier turns, as LLaMA-Factory writes them
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(item, str) for item in turn)):
            raise _Malformed("history is not a list of [asked, answered]")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.insert(0, {"role": "system", "content": row["system"]})
    asked = [_text(row, asks)] if not (form == "instruction" and _has_text(row.get("input"))) else _instruction(row)
    messages.append({"role": "user", "content": "\n\n".join(asked)})
    messages.append({"role": "assistant", "content": _text(row, answers)})
    return messages


def _instruction(row: Row) -> list[str]:
    """Instruction and input, either of which may be missing."""
    return [_text(row, (key,)) for key in ("instruction", "input") if _has_text(row.get(key))]


def _has_text(value: object) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())


def _text(row: Row, keys: tuple[str, ...]) -> str:
    """The text of the first column that is there. Numbers are written out; anything else is malformed."""
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        raise _Malformed(f"no {keys[0]}")
    value = row[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise _Malformed(f"{key} is not text")
    if not value.strip():
        raise _Malformed(f"empty {key}")
    return value


# ── lists of messages, OpenAI's and ShareGPT's ──────────────────────────────────────────────────────────────────────


def _list_messages(row: Row, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    value = next((row[key] for key in keys if row.get(key) is not None), None)
    value = _parsed(value)
    if value is None:
        raise _Malformed(f"no {keys[0]}")
    if not isinstance(value, list):
        raise _Malformed(f"{keys[0]} is not a list")
    messages = [_message(item) for item in value]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _parsed(value: object) -> Any:
    """JSON kept as text in a column (CSV, some Parquet files) as its value; anything else as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _message(item: object) -> dict[str, Any]:
    """One message in OpenAI's keys, from OpenAI's or ShareGPT's."""
    if not isinstance(item, Mapping):
        raise _Malformed("a message is not an object")
    given = item.get("role", item.get("from"))
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise _Malformed(f"unknown role {given!r}"[:60])
    content = item.get("content", item.get("value"))
    message: dict[str, Any] = {"role": role, "content": _content(content)}
    for key in _KEPT_KEYS:
        if item.get(key) is not None:
            message[key] = item[key]
    calls = item.get("tool_calls")
    if given == "function_call":
        calls, message["content"] = _sharegpt_calls(content), ""
    if calls:
        message["tool_calls"] = [_tool_call(call) for call in _as_list(_parsed(calls))]
    if item.get("weight") is not None:  # OpenAI: 0 leaves an assistant's message out of the loss
        message["weight"] = item["weight"]
    return message


def _content(content: object) -> str:
    """Text, also when it is given as parts; None (an answer that only calls a tool) is empty."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, int | float) and not isinstance(content, bool):
        return str(content)
    if isinstance(content, list):
        texts = []
        for part in content:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            else:
                raise _Malformed("content has parts that are not text")
        return "".join(texts)
    raise _Malformed("content is not text")


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _sharegpt_calls(content: object) -> list[Any]:
    value = _parsed(content)
    if isinstance(value, str):
        raise _Malformed("function_call is not JSON")
    return _as_list(value)


def _tool_call(call: object) -> dict[str, Any]:
    """A call with its arguments as an object, which is what chat templates expect (OpenAI writes them as JSON text)."""
    if not isinstance(call, Mapping):
        raise _Malformed("a tool call is not an object")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _Malformed("a tool call has no name")
    arguments = _parsed(function.get("arguments", function.get("parameters")))
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": {} if arguments is None else _bare(arguments)},
    }
    if isinstance(call.get("id"), str):
        made["id"] = call["id"]
    return made


def _bare(value: Any) -> Any:
    """Without the None that Arrow puts where another row has a key and this one has not."""
    if isinstance(value, Mapping):
        return {key: _bare(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_bare(item) for item in value]
    return value


def _conversation(messages: list[dict[str, Any]], row: Row, system: str | None) -> Conversation | Dropped:
    if not messages:
        return Dropped("no messages")
    learned = []
    for message in messages:
        weight = message.pop("weight", 1)
        has_something = bool(message["content"].strip() or message.get("tool_calls"))
        if message["role"] == "user" and not has_something:
            return Dropped("empty question")
        learned.append(message["role"] == "assistant" and has_something and weight != 0)
    if not any(message["role"] == "assistant" for message in messages):
        return Dropped("no assistant message")
    if not any(learned):
        return Dropped("empty answer")
    end = len(learned) - learned[::-1].index(True)  # what follows the last answer is never learned
    messages, learned = messages[:end], learned[:end]
    if system and messages[0]["role"] != "system":
        messages, learned = [{"role": "system", "content": system}, *messages], [False, *learned]
    return Conversation(messages, learned, _tools(row))


def _tools(row: Row) -> list[dict[str, Any]] | None:
    tools = _parsed(row.get("tools") or None)
    if tools is None:
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise _Malformed("tools is not a list of objects")
    return [_bare(tool) for tool in tools] or None
