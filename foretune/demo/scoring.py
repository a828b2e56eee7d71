"""How well answers state the facts: valid JSON, and precision, recall and F1 over whole triples.

    answer ──first JSON list──▶ triples ──normalise──▶ set ──▶ hits, said, wanted ──sum over answers──▶ micro-F1

A triple counts only if subject, relation and object are all right: a name cut short is wrong.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Triple = tuple[str, str, str]

#: Relations that say the same in both directions.
SYMMETRIC = frozenset({"spouse"})


@dataclass(frozen=True)
class TripleScore:
    """Shares between 0 and 1. ``valid_json``: the share of answers that are a JSON list of triples and nothing else."""

    valid_json: float
    precision: float
    recall: float
    f1: float


def score(outputs: Sequence[str], references: Sequence[Sequence[Triple]]) -> TripleScore:
    """Compare answers with what the sentences state, micro-averaged over all triples.

    An answer that is no JSON list of triples says nothing: it costs recall, not precision. An answer with words around
    its JSON is not valid, but what it says counts. A triple said twice counts once.

    Raises:
        ValueError: the two lists differ in length, or are empty.
    """
    if len(outputs) != len(references) or not outputs:
        raise ValueError(f"{len(outputs)} outputs for {len(references)} references")
    valid = hits = said = wanted = 0
    for output, reference in zip(outputs, references, strict=True):
        triples, clean = parse_answer(output)
        found = {normalise(triple) for triple in triples}
        true = {normalise(triple) for triple in reference}
        valid += clean
        hits += len(found & true)
        said += len(found)
        wanted += len(true)
    precision = hits / said if said else float(not wanted)
    recall = hits / wanted if wanted else float(not said)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return TripleScore(valid_json=valid / len(outputs), precision=precision, recall=recall, f1=f1)


def parse_answer(output: str) -> tuple[list[Triple], bool]:
    """The triples of an answer, and whether it is a JSON list of triples and nothing else."""
    text = output.strip()
    try:
        whole = json.loads(text)
        pure = True
    except (ValueError, RecursionError):
        whole, pure = _first_list(text), False
    if not isinstance(whole, list):
        return [], False
    triples = [triple for item in whole if (triple := _as_triple(item)) is not None]
    return triples, pure and len(triples) == len(whole)


def _first_list(text: str) -> Any:
    """The first JSON list inside a text (a code fence, a sentence before it); None if there is none."""
    start = text.find("[")
    if start < 0:
        return None
    try:
        return json.JSONDecoder().raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return None


def _as_triple(item: Any) -> Triple | None:
    """Also ``{"subject": …, "relation": …, "object": …}``: another form of the same is no fault."""
    if isinstance(item, dict) and item.keys() == {"subject", "relation", "object"}:
        item = [item["subject"], item["relation"], item["object"]]
    if not isinstance(item, list) or len(item) != 3 or not all(isinstance(part, str | int) for part in item):
        return None
    return str(item[0]), str(item[1]), str(item[2])


def normalise(triple: Triple) -> Triple:
    """Case, white space, Unicode form, a leading "the", a closing full stop and the order of spouses don't matter."""
    subject, relation, item = (_normalise_part(part) for part in triple)
    if relation in SYMMETRIC and item < subject:
        subject, item = item, subject
    return subject, relation, item


def _normalise_part(part: str) -> str:
    words = unicodedata.normalize("NFKC", part).casefold().split()
    text = " ".join(words[1:] if len(words) > 1 and words[0] == "the" else words)
    return text.rstrip(".").rstrip()
