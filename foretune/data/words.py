"""Token ids of ASCII texts by looking words up: what byte-level BPE does, with the ids of every word seen kept.

    text ──special tokens──▶ pieces ──the pre-tokenizer's pattern──▶ words ──looked up, else the model's own BPE──▶ ids

Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) cuts a text into words by a regular expression and merges within words
only, so a word's ids are always the same, and a few ten thousand words make up most texts. The Rust tokenizer spends
2 µs a token, alignments that preparing does not need among it; here it is a fifth. Only for ASCII, where the pattern
can be written for Python's `re` exactly, and only for tokenizers whose every part is known: `of` gives None for the
others, and where a sample of texts does not come out as the tokenizer's own.
"""

from __future__ import annotations

import json
import re
from typing import Any

#: Words kept; beyond, all are forgotten. And the longest that is kept, in characters.
_MOST_WORDS, _LONGEST_WORD = 500_000, 64
#: The pattern of GPT-2's pre-tokenizer, as `tokenizers` has it for ``ByteLevel(use_regex=True)``.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r" \t\n\x0b\x0c\r"  # of ASCII, what the Rust patterns call white; Python's \s has four more
_SAMPLE = [
    "Hello,  world!\n\n\nIt's 12345 o'clock\t\tHe'LL   say: \"x = y_1 + 0.5\" \r\n (a)  ",
    " leading,\x1c\x7f odd\x00 bytes  and 'quotes' ''s\n \n  x\n",
    "a" * 70 + "  1 22 333 4444 $5.00, <<48/2=24>>24\n#### 72",
]


class WordIds:
    """Encodes ASCII texts without special tokens at their ends. Build it with `of`."""

    def __init__(self, model: Any, words: re.Pattern[str], special: dict[str, int]) -> None:
        self._model, self._words, self._special = model, words, special
        longest_first = sorted(special, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if special else None
        self._known: dict[str, list[int]] = {}
        self._letters = {chr(byte): letter for byte, letter in _byte_letters().items() if byte < 128}

    @classmethod
    def of(cls, backend: Any) -> WordIds | None:
        """For a `tokenizers.Tokenizer`; None if it has a part that is not known here."""
        state = json.loads(backend.to_str())
        words, model = _pattern_of(state.get("pre_tokenizer")), state["model"]
        added = state.get("added_tokens", [])
        known = (
            words is not None
            and model["type"] == "BPE"
            and not model.get("dropout")
            and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"))
            and (state.get("normalizer") or {"type": "NFC"})["type"] in ("NFC", "NFKC")  # neither changes ASCII
            and not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
            and len({token["normalized"] for token in added}) <= 1
            and state.get("truncation") is None
            and state.get("padding") is None
        )
        if not known or words is None:
            return None
        made = cls(backend.model, words, {token["content"]: token["id"] for token in added})
        sample = [*_SAMPLE, "".join(f"x {token['content']} y{token['content']}" for token in added[:8])]
        sample = [text for text in sample if text.isascii()]
        expected = [encoding.ids for encoding in backend.encode_batch(sample, add_special_tokens=False)]
        return made if [made.encode(text) for text in sample] == expected else None

    def encode(self, text: str) -> list[int]:
        """Ids of an ASCII text."""
        if self._cut is None:
            return self._encode_plain(text, [])
        ids: list[int] = []
        for i, piece in enumerate(self._cut.split(text)):
            if i % 2:
                ids.append(self._special[piece])
            elif piece:
                self._encode_plain(piece, ids)
        return ids

    def _encode_plain(self, text: str, ids: list[int]) -> list[int]:
        known = self._known
        for word in self._words.findall(text):
            found = known.get(word)
            if found is None:
                found = self._learn(word)
            ids += found
        return ids

    def _learn(self, word: str) -> list[int]:
        letters = "".join([self._letters[character] for character in word])
        ids = [token.id for token in self._model.tokenize(letters)]
        if len(word) <= _LONGEST_WORD:
            if len(self._known) >= _MOST_WORDS:
                self._known.clear()
            self._known[word] = ids
        return ids


def _pattern_of(state: dict[str, Any] | None) -> re.Pattern[str] | None:
    """The pattern that finds a pre-tokenizer's words in ASCII; None for pre-tokenizers other than the usual ones."""
    parts = [] if state is None else state["pretokenizers"] if state["type"] == "Sequence" else [state]
    *before, last = parts or [None]
    if last is None or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not before and last["use_regex"]:
        return re.compile(_for_ascii(_GPT2), re.ASCII)
    if len(before) != 1:
        return None
    first = before[0]
    if first["type"] == "Digits" and first["individual_digits"] and last["use_regex"]:
        # A digit stands alone, and what is before it ends there: white space sees the end of its text.
        pattern = _GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
        return re.compile(_for_ascii(pattern), re.ASCII)
    is_split = first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]
    if is_split and not last["use_regex"] and "Regex" in first["pattern"]:
        try:
            return re.compile(_for_ascii(first["pattern"]["Regex"]), re.ASCII)
        except re.error:
            return None
    return None


def _for_ascii(pattern: str) -> str:
    """A pattern with Unicode classes, for ASCII texts and Python's `re`."""
    classes = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9", r"\s": _SPACES}
    out, inside, i = "", False, 0
    while i < len(pattern):
        name = next((name for name in classes if pattern.startswith(name, i)), None)
        if name is not None:
            out += classes[name] if inside else f"[{classes[name]}]"
            i += len(name)
        elif pattern.startswith(r"\S", i) and not inside:
            out, i = out + f"[^{_SPACES}]", i + 2
        elif pattern[i] == "\\":
            out, i = out + pattern[i : i + 2], i + 2
        else:
            inside = pattern[i] == "[" or (inside and pattern[i] != "]")
            out, i = out + pattern[i], i + 1
    return out


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: printable ones are themselves, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}
