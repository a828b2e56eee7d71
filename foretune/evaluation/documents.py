"""The documents that are scored: a run's held-out ones, or those of any file, prepared as the run's data were.

    RUN/data (held-out packs) ─┐
    FILE ──prepare──▶ packs ───┴─shuffled rows, until the bound──▶ micro-batches ──▶ documents with prompts and answers

in: prepared folders   out: `Documents`. The bound keeps a CPU quick; what is left out is counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foretune.artifacts import IGNORE_INDEX
from foretune.data import MicroBatch, open_loader
from foretune.data.packing import PackIndex

#: A document's first target comes after a prompt if at least this many tokens stand before it (not a lone BOS).
_LEAST_PROMPT = 4
#: Of a text, this share of the tokens (at most `_LONGEST_PREFIX`) is given, and the rest is to be written.
_PREFIX_SHARE = 0.5
_LONGEST_PREFIX = 32


@dataclass(frozen=True)
class Document:
    """One scored document.

    Attributes:
        prompt: token ids given to the model.
        answer: token ids that follow in the document (the first answer of a conversation; the rest of a text).
        is_answered: whether the data mark the answer, rather than it being the rest of a text.
    """

    number: int
    prompt: list[int]
    answer: list[int]
    is_answered: bool


@dataclass(frozen=True)
class Documents:
    """What is scored, and of how much.

    Attributes:
        name: of the data, for people.
        batches: rows for the model, in the order in which they were chosen.
        documents: those that lie in `batches`.
        available: documents that could have been scored.
    """

    name: str
    batches: list[MicroBatch]
    documents: list[Document]
    available: int


def held_out(folder: Path, *, max_tokens: int, seed: int) -> Documents:
    """The held-out documents of a prepared folder; it has some."""
    loader = open_loader(folder, seed=seed, global_batch_size=1, rank=0, world_size=1, micro_batch_size=1)
    rows = loader.validation()
    order = np.random.default_rng(seed).permutation(len(rows))
    chosen = list(_until(max_tokens, (rows[number] for number in order)))
    return Documents("held-out documents", chosen, _documents(chosen), _scorable(folder, held_out=True))


def whole_folder(folder: Path, *, name: str, max_tokens: int, seed: int) -> Documents:
    """All documents of a prepared folder that holds none out."""
    loader = open_loader(folder, seed=seed, global_batch_size=1, rank=0, world_size=1, micro_batch_size=1)
    rows = (row for step in range(loader.steps_per_epoch) for row in loader.step(step).micro_batches)
    chosen = list(_until(max_tokens, rows))
    return Documents(name, chosen, _documents(chosen), _scorable(folder, held_out=False))


def _scorable(folder: Path, *, held_out: bool) -> int:
    """Documents that have targets; a long text counts as the pieces it was split into."""
    index = PackIndex.load(folder / "packs.npz")
    pieces = np.unique(index.validation_pieces if held_out else index.pack_pieces)
    return int((index.targets[pieces] > 0).sum())


def folder_for(data: str, parent: Path) -> Path:
    """Where a file's prepared form stands below `parent`, the same for the same path."""
    stem = "".join(character if character.isalnum() else "-" for character in Path(data).stem)[:40]
    return parent / f"{stem}-{hashlib.sha256(data.encode()).hexdigest()[:8]}"


def _until(max_tokens: int, rows: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
    """Rows that have targets, until they hold `max_tokens` tokens; at least one."""
    taken = 0
    for row in rows:
        if not bool((row.shift_labels != IGNORE_INDEX).any()):
            continue
        yield row
        taken += int((row.document_ids >= 0).sum())
        if taken >= max_tokens:
            return


def _documents(batches: list[MicroBatch]) -> list[Document]:
    """The documents in the rows, in their order, with prompt and answer."""
    found = []
    for batch in batches:
        for ids, labels, owners in zip(batch.input_ids, batch.shift_labels, batch.document_ids, strict=True):
            # np.unique sorts; the order in the row is what the shuffle gave.
            for number in dict.fromkeys(owners[owners >= 0].tolist()):
                mine = owners == number
                found.append(_document(number, ids[mine], labels[mine]))
    return found


def _document(number: int, ids: np.ndarray, labels: np.ndarray) -> Document:
    """Cut a document into what is given and what is to be written. labels[t] is the token that follows ids[t]."""
    is_target = labels != IGNORE_INDEX
    first = int(is_target.argmax()) + 1 if is_target.any() else len(ids)
    if first >= _LEAST_PROMPT:
        rest = np.flatnonzero(~is_target[first - 1 :])
        end = first + (int(rest[0]) if len(rest) else len(ids) - first)
        return Document(number, ids[:first].tolist(), ids[first:end].tolist(), is_answered=True)
    cut = max(1, min(int(len(ids) * _PREFIX_SHARE), _LONGEST_PREFIX))
    return Document(number, ids[:cut].tolist(), ids[cut:].tolist(), is_answered=False)
