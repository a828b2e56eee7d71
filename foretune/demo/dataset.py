"""The demo's data: sentences of our own making and the facts they state, as JSON triples.

    patterns × names ──fill, seeded──▶ Example(sentence, triples, …) ──▶ conversations ──▶ train.jsonl, test.jsonl

`write_files` makes both files anew; a test holds the committed ones against it. The test half
shares no sentence pattern and no entity with the train half. One test sentence per pattern.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foretune.demo.patterns import patterns
from foretune.demo.vocabulary import RELATIONS, Half, is_woman, make_name

Triple = tuple[str, str, str]

TRAIN_FILE = Path(__file__).with_name("train.jsonl")
TEST_FILE = Path(__file__).with_name("test.jsonl")
TRAIN_EXAMPLES = 512
#: Examples in a training conversation. The instruction is half the tokens of a conversation with one: four to a
#: conversation teach nearly twice as many in the same time.
TRAIN_TURNS = 4
SEED = 20
#: The same for the base model and the tuned one. It names the relations, so that the base model can know them.
INSTRUCTION = (
    "List the facts as JSON triples [subject, relation, object]. Relations: " + ", ".join(sorted(RELATIONS)) + "."
)
_SLOT = re.compile(r"\{(\w+)\}")
_PRONOUNS = {"They": ("She", "He"), "they": ("she", "he"), "their": ("her", "his"), "Their": ("Her", "His")}


@dataclass(frozen=True)
class Example:
    """A sentence, what it states, and what it was made of."""

    sentence: str
    triples: list[Triple]
    pattern: str
    entities: frozenset[str]


def question(sentence: str) -> list[dict[str, str]]:
    """What a model is asked: the instruction and a sentence."""
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": sentence}]


def as_json(triples: list[Triple]) -> str:
    """Compact JSON, a list of lists: the form with the fewest tokens (25 for two facts, against 48 as objects)."""
    return json.dumps([list(triple) for triple in triples], separators=(",", ":"), ensure_ascii=False)


def make_examples(half: Half, count: int | None = None, *, seed: int = SEED) -> list[Example]:
    """Make `count` examples, every pattern as often as any other (one each by default), in an order fixed by `seed`."""
    chooser = random.Random(f"{half}-{seed}")
    known = patterns(half)
    examples: list[Example] = []
    while len(examples) < (count or len(known)):
        round_of_patterns = chooser.sample(known, len(known))
        examples += [_fill(sentence, facts, half, chooser) for sentence, facts in round_of_patterns]
    return examples[: count or len(known)]


def _fill(sentence: str, facts: list[tuple[str, str, str]], half: Half, chooser: random.Random) -> Example:
    """Put names into one pattern; no word in two of them."""
    values: dict[str, str] = {}
    for slot in dict.fromkeys(_SLOT.findall(sentence)):
        if slot in _PRONOUNS:
            values[slot] = _PRONOUNS[slot][0 if is_woman(values["person"], half) else 1]
            continue
        words: set[str] = {word for value in values.values() for word in value.split()}
        name = make_name(slot.rstrip("2"), half, chooser)
        while words & set(name.split()):
            name = make_name(slot.rstrip("2"), half, chooser)
        values[slot] = name
    triples = [(values[subject], relation, values[item]) for subject, relation, item in facts]
    entities = frozenset(value for slot, value in values.items() if slot not in _PRONOUNS and slot != "aside")
    return Example(_SLOT.sub(lambda match: values[match[1]], sentence), triples, sentence, entities)


def conversation(examples: Sequence[Example]) -> list[dict[str, str]]:
    """The instruction once, then each sentence with its triples: what a model learns, and how it is shown examples."""
    turns = [{"role": "system", "content": INSTRUCTION}]
    for example in examples:
        turns.append({"role": "user", "content": example.sentence})
        turns.append({"role": "assistant", "content": as_json(example.triples)})
    return turns


def to_jsonl(examples: Sequence[Example], *, turns: int) -> str:
    """One conversation a line, `turns` examples in each."""
    groups = [examples[start : start + turns] for start in range(0, len(examples), turns)]
    return "".join(json.dumps({"messages": conversation(group)}, ensure_ascii=False) + "\n" for group in groups)


def read_examples(path: Path) -> list[tuple[str, list[Triple]]]:
    """Sentences and triples of a file that `to_jsonl` wrote."""
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        for asked, answered in zip(messages[1::2], messages[2::2], strict=True):
            triples = [
                (str(subject), str(relation), str(item)) for subject, relation, item in json.loads(answered["content"])
            ]
            pairs.append((str(asked["content"]), triples))
    return pairs


def write_files(folder: Path = TRAIN_FILE.parent) -> None:
    """Write train.jsonl and test.jsonl into a folder; by default, over the committed ones."""
    train, test = make_examples("train", TRAIN_EXAMPLES), make_examples("test")
    (folder / TRAIN_FILE.name).write_text(to_jsonl(train, turns=TRAIN_TURNS), encoding="utf-8")
    (folder / TEST_FILE.name).write_text(to_jsonl(test, turns=1), encoding="utf-8")
