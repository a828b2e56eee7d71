"""Chat templates: what is learned of a conversation is what inference would have generated, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from foretune.artifacts import IGNORE_INDEX
from foretune.data.chat_template import ChatTemplate, Rendered, choose_template
from foretune.data.formats import Conversation, Dropped
from foretune.data.tokenise import Encoder, Recipe
from foretune.errors import UserError

MakeTokenizer = Callable[..., Any]
#: template → its end of sequence, and what it closes an answer with.
KINDS = {
    "chatml": ("<|im_end|>", "<|im_end|>"),
    "chatml_marked": ("<|im_end|>", "<|im_end|>"),
    "llama3": ("<|eot_id|>", "<|eot_id|>"),
    "gemma": ("<eos>", "<end_of_turn>"),
    "mistral": ("</s>", "</s>"),
    "phi3": ("<|endoftext|>", "<|end|>"),
    "qwen3": ("<|im_end|>", "<|im_end|>"),
    "last_eos": ("</s>", "</s>"),
    "plain": ("<|endoftext|>", ""),
    None: ("<|endoftext|>", "<|endoftext|>"),
}
TEXT = st.text(alphabet="ab 1.,!?\n\n-é你好", min_size=1, max_size=30).filter(str.strip)


def encoder_for(tokenizer: Any, *, train_on_prompt: bool = False) -> Encoder:
    template = choose_template(tokenizer, file=None, needed=True)
    return Encoder(tokenizer, template, Recipe("", True, train_on_prompt, 1 << 20, "model", False))


def conversation(*contents: str, system: str | None = None) -> Conversation:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]
    return Conversation(messages, [message["role"] == "assistant" for message in messages])


def encode(encoder: Encoder, chat: Conversation) -> tuple[list[int], list[int]]:
    rendered = encoder.template.render(chat)
    assert isinstance(rendered, Rendered), rendered
    (document,) = encoder.conversations([rendered])
    return document[0].tolist(), document[1].tolist()


def prompt_ids(encoder: Encoder, messages: list[dict[str, Any]]) -> list[int]:
    """What inference gives the model before it answers, by transformers' own way."""
    ids: list[int] = encoder.tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    return ids


def learned_texts(encoder: Encoder, ids: list[int], labels: list[int]) -> list[str]:
    """The runs of target tokens as text."""
    edges = np.flatnonzero(np.diff(np.array([IGNORE_INDEX, *labels, IGNORE_INDEX]) != IGNORE_INDEX))
    return [encoder.tokenizer.decode(ids[start:stop]) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


@pytest.fixture(scope="module")
def encoders(make_tokenizer: MakeTokenizer) -> dict[tuple[str, str | None], Encoder]:
    made = {}
    for name, (eos, _) in KINDS.items():
        for words in ("gpt2", "qwen"):
            made[words, name] = encoder_for(make_tokenizer(words=words, eos=eos, template=name))
    made["stories", None] = encoder_for(make_tokenizer(words="stories"))
    made["stories", "mistral"] = encoder_for(make_tokenizer(words="stories", template="mistral"))
    made["stories", "plain"] = encoder_for(make_tokenizer(words="stories", template="plain"))
    return made


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("words", ["gpt2", "qwen", "stories"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(TEXT, min_size=2, max_size=6).filter(lambda contents: len(contents) % 2 == 0))
@example(contents=["a", "\nb"])
@example(contents=["a", " b ", "c\n", "\n\nd"])
def test_targets_begin_where_the_inference_prompt_ends(
    encoders: dict[tuple[str, str | None], Encoder], words: str, name: str | None, contents: list[str]
) -> None:
    if (words, name) not in encoders:
        pytest.skip("this tokenizer has no such special tokens")
    encoder = encoders[words, name]
    chat = conversation(*contents)
    ids, labels = encode(encoder, chat)
    prompt = prompt_ids(encoder, chat.messages[:1])
    assert ids[: len(prompt)] == prompt
    assert set(labels[: len(prompt)]) == {IGNORE_INDEX}
    assert labels[len(prompt)] == ids[len(prompt)]
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("words", ["gpt2", "qwen", "stories"])
def test_every_answer_is_learned_with_its_closing_and_nothing_else(
    encoders: dict[tuple[str, str | None], Encoder], words: str, name: str | None
) -> None:
    if (words, name) not in encoders:
        pytest.skip("this tokenizer has no such special tokens")
    encoder = encoders[words, name]
    eos, closing = KINDS[name] if words != "stories" else ("</s>", "" if name == "plain" else "</s>")
    ids, labels = encode(encoder, conversation("How are you?", "I am well.", "And now?", "Now too."))
    first, last = learned_texts(encoder, ids, labels)
    between = closing if name != "last_eos" else ""
    ends = closing + eos if closing != eos else eos
    thinking = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    assert first.strip() == "I am well." + between
    assert last.strip() == thinking + "Now too." + ends
    assert ids[-1] == labels[-1] == encoder.tokenizer.eos_token_id


def test_the_end_of_sequence_is_learned_also_where_it_is_the_padding_token(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids, labels = encode(encoder_for(tokenizer), conversation("a", "b", "c", "d"))
    assert [label for token, label in zip(ids, labels, strict=True) if token == tokenizer.eos_token_id] == [
        tokenizer.eos_token_id
    ] * 2


def test_train_on_prompt_learns_every_token(make_tokenizer: MakeTokenizer) -> None:
    ids, labels = encode(encoder_for(make_tokenizer(), train_on_prompt=True), conversation("a", "b"))
    assert ids == labels


def test_beginning_of_sequence_is_written_once(encoders: dict[tuple[str, str | None], Encoder]) -> None:
    for key in (("stories", None), ("stories", "mistral"), ("gpt2", "mistral")):
        encoder = encoders[key]
        bos = encoder.tokenizer.convert_tokens_to_ids("<s>")
        ids, _ = encode(encoder, conversation("a", "b"))
        assert ids.count(bos) == 1
        assert ids[0] == bos


@pytest.mark.parametrize(("name", "merged"), [("gemma", True), ("mistral", True), ("chatml", False), ("qwen3", False)])
def test_a_system_text_reaches_templates_without_a_system_role(
    encoders: dict[tuple[str, str | None], Encoder], name: str, merged: bool
) -> None:
    template = encoders["gpt2", name].template
    rendered = template.render(conversation("question", "answer", system="be brief"))
    assert isinstance(rendered, Rendered)
    assert ("be brief\n\nquestion" in rendered.text) is merged
    assert "be brief" in rendered.text
    assert any("no system role" in note for note in template.notes) is merged


def test_a_template_s_refusal_is_a_reason(encoders: dict[tuple[str, str | None], Encoder]) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    outcome = encoders["gpt2", "gemma"].template.render(Conversation(messages, [False, False, True]))
    assert outcome == Dropped(
        "the chat template refuses it: Conversation roles must alternate user/assistant/user/assistant/..."
    )


def test_an_answer_of_weight_zero_is_context_only(encoders: dict[tuple[str, str | None], Encoder]) -> None:
    for name in ("chatml", "chatml_marked", "qwen3"):
        encoder = encoders["gpt2", name]
        chat = conversation("a", "bad", "b", "good")
        ids, labels = encode(encoder, Conversation(chat.messages, [False, False, False, True]))
        (text,) = learned_texts(encoder, ids, labels)
        assert "good" in text
        assert "bad" not in text


def _tool_chat() -> Conversation:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4 degrees"},
        {"role": "assistant", "content": "It is 4 degrees."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "You are welcome."},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    return Conversation(messages, [message["role"] == "assistant" for message in messages], tools)


def test_qwen3_learns_calls_of_tools_and_not_their_results(encoders: dict[tuple[str, str | None], Encoder]) -> None:
    encoder = encoders["qwen", "qwen3"]
    chat = _tool_chat()
    ids, labels = encode(encoder, chat)
    call, answer, last = learned_texts(encoder, ids, labels)
    assert call == '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    assert answer == "It is 4 degrees.<|im_end|>"
    assert last == "<think>\n\n</think>\n\nYou are welcome.<|im_end|>"


def test_the_fallback_writes_calls_of_tools(encoders: dict[tuple[str, str | None], Encoder]) -> None:
    encoder = encoders["gpt2", None]
    call, answer, _ = learned_texts(encoder, *encode(encoder, _tool_chat()))
    assert '"name": "weather"' in call
    assert call.endswith("<|endoftext|>")
    assert answer == "It is 4 degrees.<|endoftext|>"


def test_qwen3_learns_the_thinking_of_the_last_turn(encoders: dict[tuple[str, str | None], Encoder]) -> None:
    encoder = encoders["qwen", "qwen3"]
    texts = ("a", "<think>\nfirst\n</think>\n\nb", "c", "<think>\nsecond\n</think>\n\nd")
    first, last = learned_texts(encoder, *encode(encoder, conversation(*texts)))
    assert first == "b<|im_end|>"  # the template drops what was thought in earlier turns, at inference too
    assert last == "<think>\nsecond\n</think>\n\nd<|im_end|>"


def test_later_turns_begin_where_inference_ends_too(encoders: dict[tuple[str, str | None], Encoder]) -> None:
    for name in ("chatml", "llama3", "qwen3", "mistral", "gemma", None):
        encoder = encoders["qwen", name]
        chat = conversation("Hello there.", "Good day.", "And you?", "Fine.")
        ids, labels = encode(encoder, chat)
        prompt = prompt_ids(encoder, chat.messages[:3])
        assert ids[: len(prompt)] == prompt, name
        assert labels[len(prompt) - 1] == IGNORE_INDEX, name
        assert labels[len(prompt)] != IGNORE_INDEX, name


def test_a_generation_prompt_that_training_does_not_write_is_said(make_tokenizer: MakeTokenizer) -> None:
    template = choose_template(make_tokenizer(template="thinking"), file=None, needed=True)
    assert any("inference will begin with text that training did not have" in note for note in template.notes)
    rendered = template.render(conversation("a", "b"))
    assert isinstance(rendered, Rendered)
    assert rendered.text[slice(*rendered.spans[0])] == "b<|endoftext|>"


def test_stop_tokens_are_the_end_of_sequence_and_the_closing(encoders: dict[tuple[str, str | None], Encoder]) -> None:
    def stops(name: str | None) -> list[str]:
        encoder = encoders["gpt2", name]
        return list(encoder.tokenizer.convert_ids_to_tokens(encoder.template.stop_token_ids))

    assert stops("gemma") == ["<eos>", "<end_of_turn>"]
    assert stops("chatml") == ["<|im_end|>"]
    assert stops("plain") == ["<|endoftext|>"]


def test_a_given_template_wins_and_a_broken_one_is_refused(make_tokenizer: MakeTokenizer, tmp_path: Any) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}")
    template = choose_template(make_tokenizer(template="chatml"), file=str(file), needed=True)
    assert (template.origin, template.closing) == ("file", "<|endoftext|>")
    file.write_text("{% for m in messages %}")
    with pytest.raises(UserError, match="can't write a question and an answer") as refused:
        choose_template(make_tokenizer(), file=str(file), needed=True)
    assert refused.value.field == "data.chat_template"
    file.write_text("{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match="does not write the answer as it is"):
        choose_template(make_tokenizer(), file=str(file), needed=True)
    with pytest.raises(UserError, match="no such file"):
        choose_template(make_tokenizer(), file=str(tmp_path / "none.jinja"), needed=True)


def test_text_alone_needs_no_template(make_tokenizer: MakeTokenizer) -> None:
    template: ChatTemplate = choose_template(make_tokenizer(), file=None, needed=False)
    assert template.origin == "none"
    assert template.tokenizer.chat_template is None
