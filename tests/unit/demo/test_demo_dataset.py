"""The committed demo files: made by the generator, true to their sentences, and two halves that share nothing."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path

import pytest

from foretune.data.formats import detect
from foretune.demo import few_shot_messages
from foretune.demo.dataset import (
    INSTRUCTION,
    TEST_FILE,
    TRAIN_EXAMPLES,
    TRAIN_FILE,
    Triple,
    make_examples,
    question,
    read_examples,
    write_files,
)
from foretune.demo.patterns import patterns
from foretune.demo.vocabulary import ASIDES, MEN, RELATIONS, WOMEN, Half

Pairs = list[tuple[str, list[Triple]]]
FILES: dict[Half, Path] = {"train": TRAIN_FILE, "test": TEST_FILE}
HALVES: tuple[Half, Half] = ("train", "test")
SLOT = re.compile(r"\{(\w+)\}")


@pytest.fixture(scope="module")
def train() -> Pairs:
    return read_examples(TRAIN_FILE)


@pytest.fixture(scope="module")
def test() -> Pairs:
    return read_examples(TEST_FILE)


def test_the_committed_files_are_what_the_generator_makes(tmp_path: Path) -> None:
    write_files(tmp_path)
    for file in FILES.values():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), (
            f"{file.name}: call foretune.demo.dataset.write_files()"
        )


def test_sizes(train: Pairs, test: Pairs) -> None:
    assert sum(file.stat().st_size for file in FILES.values()) <= 200_000
    assert len(train) == TRAIN_EXAMPLES
    assert len(test) == len(patterns("test")) >= 40
    assert len({sentence for sentence, _ in train}) == len(train)


def test_rows_are_conversations_of_a_known_form() -> None:
    for file in FILES.values():
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            assert detect(row, wanted="auto", field="data", path=str(file)) == "messages"
            assert row["messages"][0] == {"role": "system", "content": INSTRUCTION}
            roles = [message["role"] for message in row["messages"][1:]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)


def entities(pairs: Pairs) -> set[str]:
    return {name for _, triples in pairs for triple in triples for name in (triple[0], triple[2])}


def capitalised_words(names: set[str]) -> set[str]:
    return {word.casefold() for name in names for word in re.findall(r"[\w'-]+", name)}


def test_halves_share_no_entity_nor_a_word_of_one(train: Pairs, test: Pairs) -> None:
    assert entities(train)
    assert not entities(train) & entities(test)
    assert not capitalised_words(entities(train)) & capitalised_words(entities(test))


def test_no_entity_of_one_half_is_mentioned_in_the_other(train: Pairs, test: Pairs) -> None:
    """Also those that are mentioned without a fact: a city someone passed through."""
    for names, half in ((entities(train), "test"), (entities(test), "train")):
        text = "\n".join(
            example.sentence for example in make_examples(half, TRAIN_EXAMPLES if half == "train" else None)
        )  # type: ignore[arg-type]
        assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", text)]


def as_expression(pattern: str, half: Half) -> re.Pattern[str]:
    """A regular expression that finds the sentences a pattern can make, with names of any half."""
    name = r"[A-Z][\w'-]+(?: [A-Z][\w'-]+)?"
    expression = ""
    for piece in re.split(r"(\{\w+\})", pattern):
        slot = SLOT.fullmatch(piece)
        if slot is None:
            expression += re.escape(piece)
        elif slot[1].startswith("year"):
            expression += r"\d{4}"
        elif slot[1] == "aside":
            expression += (
                "(?:" + "|".join(re.escape(aside) for both in ASIDES.values() for aside in both.split(", ")) + ")"
            )
        else:
            expression += r"(?:[Ss]he|[Hh]e|[Hh]er|[Hh]is)" if slot[1].lower() in ("they", "their") else name
    return re.compile(expression)


def test_halves_share_no_sentence_pattern(train: Pairs, test: Pairs) -> None:
    pairs: dict[Half, Pairs] = {"train": train, "test": test}
    for own, other in (HALVES, HALVES[::-1]):
        expressions = [as_expression(pattern, own) for pattern, _ in patterns(own)]
        assert all(any(e.fullmatch(sentence) for e in expressions) for sentence, _ in pairs[own]), "the check is blind"
        crossing = [sentence for sentence, _ in pairs[other] if any(e.fullmatch(sentence) for e in expressions)]
        assert not crossing


def test_patterns_of_the_halves_are_not_even_alike() -> None:
    bare = {half: [SLOT.sub("#", pattern).split() for pattern, _ in patterns(half)] for half in HALVES}
    for asked in bare["test"]:
        nearest = max(bare["train"], key=lambda words: difflib.SequenceMatcher(None, asked, words).ratio())
        assert difflib.SequenceMatcher(None, asked, nearest).ratio() < 0.85, (asked, nearest)
    for half in HALVES:
        sentences = [pattern for pattern, _ in patterns(half)]
        assert len(set(sentences)) == len(sentences)


def test_facts_are_about_names_in_the_sentence(train: Pairs, test: Pairs) -> None:
    for sentence, triples in train + test:
        assert "{" not in sentence
        for subject, relation, item in triples:
            assert subject in sentence
            assert item in sentence
            assert relation in RELATIONS
        assert len(set(triples)) == len(triples)


def test_relations_connect_the_kinds_they_are_made_for() -> None:
    for half in HALVES:
        for pattern, facts in patterns(half):
            slots = set(SLOT.findall(pattern))
            for subject, relation, item in facts:
                assert {subject, item} <= slots, pattern
                subjects, object_kind = RELATIONS[relation]
                assert subject.rstrip("2") in subjects, pattern
                assert item.rstrip("2") == object_kind, pattern


def test_every_relation_is_learnt_and_asked_about_and_named_to_the_model(train: Pairs, test: Pairs) -> None:
    assert len(RELATIONS) >= 12
    for pairs in (train, test):
        assert {relation for _, triples in pairs for _, relation, _ in triples} == set(RELATIONS)
    assert all(relation in INSTRUCTION for relation in RELATIONS)


def test_pronouns_agree_with_the_person() -> None:
    examples = [
        example for example in make_examples("train", 4 * len(patterns("train"))) if "{They}" in example.pattern
    ]
    by_pronoun: dict[str, set[str]] = {"She": set(), "He": set()}
    for example in examples:
        said = re.findall(r"\b(She|He)\b", example.sentence)
        first = re.match(r"\w+", example.sentence)
        assert len(said) == 1, example.sentence
        assert first is not None
        if example.pattern.startswith("{person}"):
            by_pronoun[said[0]].add(first[0])
    assert by_pronoun["She"] <= set(WOMEN["train"].split())
    assert by_pronoun["He"] <= set(MEN["train"].split())
    assert all(len(names) > 5 for names in by_pronoun.values())


def test_the_worked_examples_are_training_examples(train: Pairs) -> None:
    shown = few_shot_messages()
    assert len(shown) == 6
    sentences = {sentence for sentence, _ in train}
    assert all(message["content"] in sentences for message in shown[::2])
    assert question("x")[0]["content"] == INSTRUCTION
