"""Laws of the triple score."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.demo.dataset import as_json
from foretune.demo.scoring import Triple, TripleScore, normalise, parse_answer, score

part = st.text(st.characters(codec="utf-8", exclude_characters=".", categories=("L", "N")), min_size=1, max_size=8)
triple = st.tuples(part, part.filter(lambda text: text != "spouse"), part)
triples = st.lists(triple, max_size=4)
batches = st.lists(triples, min_size=1, max_size=4)


def distinct(reference: list[Triple]) -> set[Triple]:
    return {normalise(item) for item in reference}


@given(batches)
def test_saying_exactly_the_facts_is_perfect(references: list[list[Triple]]) -> None:
    assert score([as_json(reference) for reference in references], references) == TripleScore(1.0, 1.0, 1.0, 1.0)


@given(st.lists(st.tuples(st.text(), triples), min_size=1, max_size=4))
def test_any_text_is_scored_between_nothing_and_everything(pairs: list[tuple[str, list[Triple]]]) -> None:
    result = score([text for text, _ in pairs], [reference for _, reference in pairs])
    for value in (result.valid_json, result.precision, result.recall, result.f1):
        assert 0.0 <= value <= 1.0
    assert min(result.precision, result.recall) - 1e-12 <= result.f1 <= max(result.precision, result.recall) + 1e-12


@given(batches, triple)
def test_a_wrong_fact_costs_precision_and_no_recall(references: list[list[Triple]], wrong: Triple) -> None:
    if normalise(wrong) in distinct(references[0]) or not any(references):
        return
    outputs = [as_json([*reference, wrong] if index == 0 else reference) for index, reference in enumerate(references)]
    result = score(outputs, references)
    assert result.recall == 1.0
    assert result.precision < 1.0


@given(batches)
def test_a_fact_left_out_costs_recall_and_no_precision(references: list[list[Triple]]) -> None:
    index = next((index for index, reference in enumerate(references) if len(distinct(reference)) > 1), None)
    if index is None:
        return
    left = [item for item in references[index] if normalise(item) != normalise(references[index][0])]
    result = score([as_json(left if i == index else reference) for i, reference in enumerate(references)], references)
    assert result.precision == 1.0
    assert result.recall < 1.0


@given(batches, st.randoms(use_true_random=False))
def test_order_and_repetition_do_not_matter(references: list[list[Triple]], chooser: object) -> None:
    shuffled = []
    for reference in references:
        again = reference + reference[:1]
        chooser.shuffle(again)  # type: ignore[attr-defined]
        shuffled.append(as_json(again))
    assert score(shuffled, references) == TripleScore(1.0, 1.0, 1.0, 1.0)


def test_a_case_by_hand() -> None:
    references: list[list[Triple]] = [[("A", "founder", "B"), ("A", "year", "1901")], [("C", "capital", "D")]]
    outputs = ['[["A","founder","B"],["A","owner","B"]]', 'Sure: [["c","capital","the D."]]']
    result = score(outputs, references)
    assert result.valid_json == 0.5
    assert result.precision == pytest.approx(2 / 3)
    assert result.recall == pytest.approx(2 / 3)
    assert result.f1 == pytest.approx(2 / 3)


def test_nothing_said_of_something_is_no_success() -> None:
    assert score(["I do not know"], [[("A", "owner", "B")]]) == TripleScore(0.0, 0.0, 0.0, 0.0)
    assert score(["[]"], [[("A", "owner", "B")]]) == TripleScore(1.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("output", "count", "clean"),
    [
        ('[["a","owner","b"]]', 1, True),
        ("[]", 0, True),
        (' [["a","year",1901]]\n', 1, True),
        ('[{"subject":"a","relation":"owner","object":"b"}]', 1, True),
        ('```json\n[["a","owner","b"]]\n```', 1, False),
        ('[["a","owner","b"]] and so on', 1, False),
        ('[["a","owner"]]', 0, False),
        ('[["a","owner",null]]', 0, False),
        ('["a","owner","b"]', 0, False),
        ('{"a": 1}', 0, False),
        ('[["a","owner","b"], ["c"', 0, False),
        ("[" * 100_000, 0, False),
        ("", 0, False),
        ("null", 0, False),
    ],
)
def test_what_counts_as_an_answer(output: str, count: int, clean: bool) -> None:
    found, pure = parse_answer(output)
    assert (len(found), pure) == (count, clean)


def test_names_must_be_whole_and_directions_right() -> None:
    reference: list[list[Triple]] = [[("Norvex Mills", "owner", "Polar Bank")]]
    for wrong in (
        ["Norvex", "owner", "Polar Bank"],
        ["Polar Bank", "owner", "Norvex Mills"],
        ["Norvex Mills", "founder", "Polar Bank"],
    ):
        assert score([json.dumps([wrong])], reference).f1 == 0.0


def test_spouses_are_each_others() -> None:
    assert score(['[["B","spouse","A"]]'], [[("A", "spouse", "B")]]).f1 == 1.0


def test_lists_must_match() -> None:
    with pytest.raises(ValueError, match="2 outputs for 1"):
        score(["", ""], [[]])
    with pytest.raises(ValueError, match="0 outputs"):
        score([], [])
