"""Forms of rows: told apart by their columns, brought to texts and conversations, or dropped with a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretune.data.formats import Conversation, Dropped, Text, detect, normalise
from foretune.errors import UserError

ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def find(*columns: str, wanted: str = "auto") -> str:
    return detect(columns, wanted=wanted, field="data.sources[0].path", path="rows.jsonl")


def talk(row: Any, form: str, **options: Any) -> list[dict[str, Any]]:
    outcome = normalise(row, form, **options)
    assert isinstance(outcome, Conversation), outcome
    return outcome.messages


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        ("text", "text"),
        ("text id meta", "text"),
        ("prompt completion", "prompt_completion"),
        ("prompt response", "prompt_completion"),
        ("instruction output", "instruction"),
        ("instruction input output history system", "instruction"),
        ("instruction input response", "instruction"),
        ("instruction input output text", "instruction"),
        ("question answer", "question_answer"),
        ("messages", "messages"),
        ("messages tools id", "messages"),
        ("conversations system tools", "conversations"),
    ],
)
def test_forms_are_told_from_columns(columns: str, form: str) -> None:
    assert find(*columns.split()) == form


def test_columns_that_fit_nothing_are_refused_with_those_seen_and_the_forms_known() -> None:
    with pytest.raises(UserError) as refused:
        find("author", "title", "paragraphs")
    assert "author, paragraphs, title" in refused.value.problem
    assert "messages [{role, content}]" in refused.value.mend
    assert refused.value.field == "data.sources[0].path"


def test_columns_that_fit_several_forms_are_refused_until_one_is_named() -> None:
    columns = ("messages", "question", "answer")
    with pytest.raises(UserError, match="several forms") as refused:
        find(*columns)
    assert "messages, question_answer" in refused.value.mend
    assert find(*columns, wanted="question_answer") == "question_answer"
    assert find("instruction", "output", "text", wanted="text") == "text"


def test_a_named_form_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="not of the form 'messages'"):
        find("text", wanted="messages")


@pytest.mark.parametrize("columns", ["conversations chosen rejected", "prompt completion label", "messages kto_tag"])
def test_preference_data_is_told_apart_and_refused(columns: str) -> None:
    with pytest.raises(UserError, match="preferences") as refused:
        find(*columns.split())
    assert "preferred answers alone" in refused.value.mend


def test_texts() -> None:
    assert normalise({"text": "  once\n"}, "text") == Text("  once\n")
    assert normalise("once", "text") == Text("once")


def test_pairs() -> None:
    assert talk({"prompt": "a", "completion": "b"}, "prompt_completion") == [ASK, ANSWER]
    assert talk({"question": "a", "answer": "b"}, "question_answer") == [ASK, ANSWER]
    assert talk({"instruction": "a", "input": "", "output": "b"}, "instruction") == [ASK, ANSWER]
    assert talk({"instruction": "a", "output": None, "response": "b"}, "instruction") == [ASK, ANSWER]
    with_input = talk({"instruction": "a", "input": "x", "output": "b"}, "instruction")
    assert with_input[0]["content"] == "a\n\nx"
    assert talk({"instruction": "", "input": "x", "output": "b"}, "instruction")[0]["content"] == "x"
    assert talk({"question": "2+2", "answer": 4}, "question_answer")[1]["content"] == "4"


def test_pairs_with_history_and_system() -> None:
    row = {"instruction": "a", "output": "b", "history": [["q", "r"]], "system": "be brief"}
    assert [message["content"] for message in talk(row, "instruction")] == ["be brief", "q", "r", "a", "b"]


def test_a_conversation_cut_in_two() -> None:
    assert talk({"prompt": [ASK], "completion": [ANSWER]}, "prompt_completion") == [ASK, ANSWER]


def test_messages_of_openai() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "!"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "thanks"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "strict": None}}],
    }
    outcome = normalise(row, "messages")
    assert isinstance(outcome, Conversation)
    roles = [message["role"] for message in outcome.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"], "what follows the last answer is left out"
    assert outcome.messages[1]["content"] == "a!"
    assert outcome.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert outcome.messages[3]["tool_call_id"] == "1"
    assert outcome.learned == [False, False, True, False, True]
    assert outcome.tools == [{"type": "function", "function": {"name": "f"}}]


def test_conversations_of_sharegpt() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"x": 1}})},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "b"},
        ],
        "system": "be brief",
        "tools": json.dumps([{"name": "f"}]),
    }
    outcome = normalise(row, "conversations")
    assert isinstance(outcome, Conversation)
    assert [message["role"] for message in outcome.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert outcome.messages[2]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert outcome.tools == [{"name": "f"}]


def test_lists_kept_as_json_text() -> None:
    assert talk({"messages": json.dumps([ASK, ANSWER])}, "messages") == [ASK, ANSWER]


def test_weight_zero_is_not_learned() -> None:
    row = {"messages": [ASK, {**ANSWER, "weight": 0}, ASK, {**ANSWER, "weight": 1}]}
    outcome = normalise(row, "messages")
    assert isinstance(outcome, Conversation)
    assert outcome.learned == [False, False, False, True]
    assert "weight" not in outcome.messages[1]
    assert normalise({"messages": [ASK, {**ANSWER, "weight": 0}]}, "messages") == Dropped("empty answer")


def test_a_system_text_for_those_without() -> None:
    assert talk({"question": "a", "answer": "b"}, "question_answer", system="s")[0] == {
        "role": "system",
        "content": "s",
    }
    row = {"messages": [{"role": "system", "content": "own"}, ASK, ANSWER]}
    assert talk(row, "messages", system="s")[0]["content"] == "own"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "from", "content", "value", "tool_calls", "function", "name", "arguments", "type", "weight"]
            ),
            inner | st.sampled_from(["user", "assistant", "function_call", "tool", "text", "{}", "[]"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)
COLUMNS = ["text", "prompt", "completion", "instruction", "input", "output", "history", "system", "question", "answer"]
COLUMNS += ["messages", "conversations", "tools"]


@given(
    row=VALUES | st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=6),
    form=st.sampled_from(["text", "prompt_completion", "instruction", "question_answer", "messages", "conversations"]),
)
@settings(max_examples=500, deadline=None)
def test_no_row_is_an_accident(row: Any, form: str) -> None:
    outcome = normalise(row, form, system="s")
    assert isinstance(outcome, Text | Conversation | Dropped)
    if isinstance(outcome, Conversation):
        assert outcome.messages[-1]["role"] == "assistant"
        assert outcome.learned[-1]
        assert len(outcome.messages) == len(outcome.learned)
        assert all(isinstance(message["content"], str) for message in outcome.messages)


@pytest.mark.parametrize(
    ("row", "form", "reason"),
    [
        (7, "text", "row is not an object"),
        ({}, "text", "no text"),
        ({"text": " \n"}, "text", "empty text"),
        ({"text": ["a"]}, "text", "text is not text"),
        ({"question": "a", "answer": ""}, "question_answer", "empty answer"),
        ({"question": "a", "answer": None}, "question_answer", "no answer"),
        ({"question": "a", "answer": True}, "question_answer", "answer is not text"),
        ({"question": " ", "answer": "b"}, "question_answer", "empty question"),
        (
            {"instruction": "a", "output": "b", "history": ["q"]},
            "instruction",
            "history is not a list of [asked, answered]",
        ),
        ({"prompt": [ASK], "completion": "b"}, "prompt_completion", "prompt and completion are not of one kind"),
        ({"messages": "hello"}, "messages", "messages is not a list"),
        ({"messages": None}, "messages", "no messages"),
        ({"messages": []}, "messages", "no messages"),
        ({"messages": [ASK]}, "messages", "no assistant message"),
        ({"messages": ["a"]}, "messages", "a message is not an object"),
        ({"messages": [{"role": "pirate", "content": "a"}]}, "messages", "unknown role 'pirate'"),
        ({"messages": [{"role": "user", "content": ""}, ANSWER]}, "messages", "empty question"),
        ({"messages": [ASK, {"role": "assistant", "content": {"a": 1}}]}, "messages", "content is not text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            "messages",
            "content has parts that are not text",
        ),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "conversations", "function_call is not JSON"),
        ({"messages": [ASK, ANSWER], "tools": "f"}, "messages", "tools is not a list of objects"),
    ],
)
def test_rows_that_can_t_be_used_have_a_reason(row: Any, form: str, reason: str) -> None:
    assert normalise(row, form) == Dropped(reason)
