"""Looked-up ids against the Rust tokenizer's own, on any ASCII text, for the pre-tokenizers that models use."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from foretune.data.words import WordIds

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
BARE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
KINDS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"), BARE]),
    "qwen": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), behavior="isolated"), BARE]),
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im"]
TRAINING = [
    Path(__file__).read_text(),
    "It's the cat's hat, they'll say 12345 times:\n\n  `x += 1`\t\t# done.\r\n" * 20,
]


def make(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = KINDS[kind]
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TRAINING, trainer)
    return tokenizer


MADE = {kind: make(kind) for kind in KINDS}
WORDS = {kind: WordIds.of(tokenizer) for kind, tokenizer in MADE.items()}
#: Letters at random, and what the patterns turn on: spaces of all kinds, quotes, digits, special tokens cut short.
PIECES = st.one_of(
    st.characters(max_codepoint=127),
    st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", "'s", "'LL", "'", "12", "3", "x", "Ab", *SPECIAL]),
)


@pytest.mark.parametrize("kind", list(KINDS))
def test_known_kinds_are_known(kind: str) -> None:
    assert WORDS[kind] is not None


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join))
def test_every_ascii_text_gets_the_tokenizers_own_ids(text: str) -> None:
    for kind, tokenizer in MADE.items():
        words = WORDS[kind]
        assert words is not None
        assert words.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids, (kind, text)


def test_what_is_not_known_is_left_to_the_tokenizer() -> None:
    spaced = make("gpt2")
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    metaspace = make("gpt2")
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    stripping = make("gpt2")
    stripping.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    lower = make("gpt2")
    lower.normalizer = normalizers.Lowercase()
    cutting = make("gpt2")
    cutting.enable_truncation(5)
    for tokenizer in (spaced, metaspace, stripping, lower, cutting):
        assert WordIds.of(tokenizer) is None


def test_few_words_are_kept_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foretune.data.words._MOST_WORDS", 10)
    tokenizer = MADE["gpt2"]
    words = WordIds.of(tokenizer)
    assert words is not None
    text = " ".join(f"word{i} w{'a' * i}" for i in range(100))
    assert words.encode(text) == tokenizer.encode(text).ids
    assert len(words._known) <= 10
