"""What of the stored documents is used, and how: pieces, held-out share, repeats by weight, tokens per row.

In: the stored documents and what is wanted.  Out: a `PackIndex` and the counts for the summary. Arithmetic on counts
and digests; tokens are read only where a conversation is truncated.

    documents ──drop duplicates, cut to max_length──▶ pieces ──hold out──▶ training pieces ──repeat by weight──▶ packs
                                                                  └──────▶ held-out pieces ────────────────────▶ packs

A long plain text is stored in parts, which are counted as the one document that they are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.artifacts import IGNORE_INDEX
from foretune.data.loader import DocumentStore
from foretune.data.packing import Ints, PackIndex, pack_pieces

#: Rows longer than this are not chosen by themselves: conversations rarely need more, texts are split anyway.
LONGEST_CHAT_ROW, LONGEST_TEXT_ROW, SHORTEST_ROW = 4096, 1024, 128
#: With fewer documents than this nothing is held out; and more than this many tell no more.
FEWEST_TO_HOLD_OUT, MOST_HELD_OUT = 10, 1000
_ORDER, _REPEATS, _VALIDATION_ORDER = 1, 2, 3  # streams of the seed


@dataclass(frozen=True)
class Wanted:
    """What the configuration asks of the selection."""

    max_length: int | None  # None: decide
    context_length: int
    deduplicate: bool
    validation: float
    seed: int
    weights: list[float]  # per source


@dataclass
class Selection:
    """What was decided, with its counts."""

    index: PackIndex
    max_length: int
    max_length_reason: str
    documents: int = 0
    documents_of_source: list[int] = field(default_factory=list)
    validation_documents: int = 0
    duplicates: int = 0
    truncated_documents: int = 0
    truncated_tokens: int = 0
    split_documents: int = 0
    longest_document: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def select(store: DocumentStore, source_of: Ints, is_text: NDArray[np.bool_], wanted: Wanted) -> Selection:
    """Choose and pack.

    Args:
        store: all stored documents; dropped rows are empty. source_of: int64 [documents], which source each is of.
        is_text: bool [documents], whether it may be split (a text) or only truncated (a conversation).
    """
    lengths = store.lengths()
    head_of = heads(store)
    kept = np.flatnonzero(lengths > 0)
    duplicates = 0
    if wanted.deduplicate:
        unique = _first_of_each(store, kept)
        duplicates, kept = kept.size - unique.size, unique
    num_heads = int(head_of[-1]) + 1 if head_of.size else 0
    whole_lengths = np.bincount(head_of[kept], weights=lengths[kept], minlength=num_heads).astype(np.int64)
    longest = int(whole_lengths.max(initial=0))
    max_length, reason = _row_length(longest, bool(is_text[kept].all()), wanted)
    cut = _cut(store, kept, lengths, is_text, max_length)
    texts = np.unique(head_of[kept[is_text[kept]]])
    selection = Selection(
        index=_EMPTY,
        max_length=max_length,
        max_length_reason=reason,
        duplicates=duplicates,
        truncated_documents=cut.truncated,
        truncated_tokens=cut.truncated_tokens,
        split_documents=int(np.count_nonzero(whole_lengths[texts] > max_length)),
        longest_document=longest,
    )
    if cut.without_target:
        selection.dropped["no target token left within max_length"] = cut.without_target
    units = head_of[cut.documents]
    held_out = _hold_out(_digests(store), units, head_of, wanted, selection)
    piece_lengths = cut.stops - cut.starts
    training = _repeat(np.flatnonzero(~held_out), source_of[cut.documents], wanted)
    pieces, offsets = pack_pieces(training, piece_lengths, max_length, _random(wanted, _ORDER))
    validation, validation_offsets = pack_pieces(
        np.flatnonzero(held_out), piece_lengths, max_length, _random(wanted, _VALIDATION_ORDER)
    )
    selection.index = PackIndex(
        cut.documents, cut.starts, cut.stops, cut.targets, pieces, offsets, validation, validation_offsets
    )
    selection.documents = int(np.unique(units[~held_out]).size)
    selection.validation_documents = int(np.unique(units[held_out]).size)
    _, first = np.unique(units, return_index=True)
    used = source_of[cut.documents[first]]
    selection.documents_of_source = np.bincount(used, minlength=len(wanted.weights)).tolist()
    return selection


def heads(store: DocumentStore) -> Ints:
    """Which document each stored one is (a part of), counted from 0: int64 [documents]."""
    return np.cumsum(_flags(store, "first"), dtype=np.int64) - 1


_NONE = np.zeros(0, dtype=np.int64)
_EMPTY = PackIndex(_NONE, _NONE, _NONE, _NONE, _NONE, np.zeros(1, dtype=np.int64), _NONE, np.zeros(1, dtype=np.int64))


def _random(wanted: Wanted, stream: int) -> np.random.Generator:
    return np.random.default_rng([wanted.seed, stream])


def _first_of_each(store: DocumentStore, kept: Ints) -> Ints:
    """Of documents with equal tokens and labels, the first. Parts of a longer text are never dropped."""
    digests = _digests(store)[kept]
    whole = (_flags(store, "first") & _flags(store, "last"))[kept]
    _, first = np.unique(digests, return_index=True)
    is_first = np.zeros(kept.size, dtype=bool)
    is_first[first] = True
    return kept[is_first | ~whole]


def _digests(store: DocumentStore) -> NDArray[np.void]:
    """The 16-byte digests as one array [documents] of opaque values."""
    chunks = [b"".join(chunk.to_pylist()) for chunk in store.column("digest").chunks]
    return np.frombuffer(b"".join(chunks), dtype="V16")


def _flags(store: DocumentStore, name: str) -> NDArray[np.bool_]:
    values: NDArray[np.bool_] = store.column(name).to_numpy().astype(bool)
    return values


def _row_length(longest: int, only_text: bool, wanted: Wanted) -> tuple[int, str]:
    if wanted.max_length is not None:
        return wanted.max_length, "set by train.max_length"
    limit = LONGEST_TEXT_ROW if only_text else LONGEST_CHAT_ROW
    row = max(SHORTEST_ROW, 1 << max(longest - 1, 0).bit_length())
    if row <= min(limit, wanted.context_length):
        return row, f"the smallest power of two that holds the longest document ({longest} tokens)"
    longer = "longer texts are split" if only_text else "longer conversations are truncated"
    if wanted.context_length <= limit:
        return wanted.context_length, f"the model's context; {longer} (the longest has {longest} tokens)"
    return limit, f"{longer} (the longest has {longest} tokens); set train.max_length for more"


@dataclass
class _Pieces:
    documents: Ints
    starts: Ints
    stops: Ints
    targets: Ints
    truncated: int = 0
    truncated_tokens: int = 0
    without_target: int = 0


def _cut(store: DocumentStore, kept: Ints, lengths: Ints, is_text: NDArray[np.bool_], max_length: int) -> _Pieces:
    """Slices of at most `max_length` tokens, in the order of the documents.

    Consecutive pieces of a text share one token, the last of the one and the context of the other's first target: every
    token but a text's first is a target exactly once.
    """
    targets = store.column("targets").to_numpy().astype(np.int64)
    fits = lengths[kept] <= max_length
    whole = kept[fits]
    parts: list[Ints] = [np.stack([whole, np.zeros_like(whole), lengths[whole], targets[whole]], axis=1)]
    cut = _Pieces(_NONE, _NONE, _NONE, _NONE)
    for document in kept[~fits].tolist():
        length = int(lengths[document])
        if is_text[document]:
            starts = np.arange(0, length - 1, max_length - 1, dtype=np.int64)
            stops = np.minimum(starts + max_length, length)
            parts.append(np.stack([np.full_like(starts, document), starts, stops, stops - starts - 1], axis=1))
            continue
        _, labels = store.read(document, 0, max_length)
        left = int(np.count_nonzero(labels[1:] != IGNORE_INDEX))
        if left == 0:
            cut.without_target += 1
            continue
        cut.truncated += 1
        cut.truncated_tokens += length - max_length
        parts.append(np.array([[document, 0, max_length, left]], dtype=np.int64))
    table = np.concatenate(parts)
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    cut.documents, cut.starts, cut.stops, cut.targets = (np.ascontiguousarray(table[:, i]) for i in range(4))
    return cut


def _hold_out(
    digests: NDArray[np.void], units: Ints, head_of: Ints, wanted: Wanted, selection: Selection
) -> NDArray[np.bool_]:
    """Which pieces are held out: whole documents by a hash of tokens and seed; of a few long texts, their ends.

    A hash and not a draw: the choice does not depend on the order of the rows, nor on what other rows there are.

    Args:
        digests: [stored documents]. units: int64 [pieces], which document each piece is of; `head_of`: each stored one.
    """
    held_out = np.zeros(units.size, dtype=bool)
    documents, first, counts = np.unique(units, return_index=True, return_counts=True)
    if wanted.validation == 0 or documents.size == 0:
        return held_out
    if documents.size >= FEWEST_TO_HOLD_OUT:
        number = min(max(1, round(wanted.validation * documents.size)), MOST_HELD_OUT, documents.size - 1)
        stored = np.searchsorted(head_of, documents)  # the first part of each
        chosen = documents[np.argsort(_mixed(digests[stored], wanted.seed), kind="stable")[:number]]
        held_out = np.isin(units, chosen)
    elif units.size >= FEWEST_TO_HOLD_OUT:
        shares = np.minimum(np.round(wanted.validation * counts).astype(np.int64), counts - 1)
        shares[np.argmax(counts)] = max(1, shares[np.argmax(counts)])
        shares = np.minimum(shares, MOST_HELD_OUT)
        for start, count, share in zip(first.tolist(), counts.tolist(), shares.tolist(), strict=True):
            held_out[start + count - share : start + count] = True
        selection.notes.append("held out are the ends of the texts, as there are few of them")
    else:
        selection.notes.append(f"nothing is held out: {documents.size} documents are too few")
    return held_out


def _mixed(digests: NDArray[np.void], seed: int) -> NDArray[np.uint64]:
    """A 64-bit key of each digest and the seed (the finaliser of splitmix64, Steele et al. 2014)."""
    words = np.frombuffer(digests.tobytes(), dtype=np.uint64).reshape(-1, 2)
    keys = words[:, 0] ^ (np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64) + words[:, 1])
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    mixed: NDArray[np.uint64] = keys ^ (keys >> np.uint64(31))
    return mixed


def _repeat(training: Ints, source_of_piece: Ints, wanted: Wanted) -> Ints:
    """Each piece as often as its source's weight says, in every epoch: its floor, and a random share once more."""
    if all(weight == 1.0 for weight in wanted.weights):
        return training
    repeated: list[Any] = []
    generator = _random(wanted, _REPEATS)
    for source, weight in enumerate(wanted.weights):
        pieces = training[source_of_piece[training] == source]
        extra = round((weight - int(weight)) * pieces.size)
        repeated += [pieces] * int(weight) + [np.sort(generator.permutation(pieces)[:extra])]
    return np.concatenate(repeated).astype(np.int64)
