"""Best-fit packing: every item once, no row too long, no worse than what theory promises."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from foretune.data.packing import PackIndex, pack, pack_pieces

LENGTHS = st.integers(1, 64).flatmap(
    lambda longest: st.tuples(st.just(longest), st.lists(st.integers(1, longest), max_size=200))
)


def first_fit(lengths: list[int], max_length: int) -> int:
    """Rows that first-fit in the order of the items needs: the naive way, item by item."""
    rows: list[int] = []
    for length in lengths:
        for i, used in enumerate(rows):
            if used + length <= max_length:
                rows[i] += length
                break
        else:
            rows.append(length)
    return len(rows)


@given(LENGTHS)
@settings(max_examples=300, deadline=None)
def test_every_item_once_no_row_too_long_and_few_rows(case: tuple[int, list[int]]) -> None:
    max_length, items = case
    lengths = np.array(items, dtype=np.int64)
    placed, offsets = pack(lengths, max_length)
    assert sorted(placed.tolist()) == list(range(len(items)))
    assert offsets[0] == 0
    assert offsets[-1] == len(items)
    rows = [lengths[placed[a:b]] for a, b in itertools.pairwise(offsets)]
    assert all(0 < row.sum() <= max_length for row in rows)
    # At most 11/9 of the optimum + 1 (Johnson 1973), which first-fit's rows bound from above; and no two rows would fit
    # into one, so more than half of all rows but one is used.
    assert len(rows) <= 11 / 9 * first_fit(sorted(items, reverse=True), max_length) + 1
    assert len(rows) <= 2 * -(-sum(items) // max_length)
    again, again_offsets = pack(lengths, max_length)
    assert np.array_equal(placed, again)
    assert np.array_equal(offsets, again_offsets)


@given(LENGTHS, st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_random_ties_change_neighbours_and_not_the_number_of_rows(case: tuple[int, list[int]], seed: int) -> None:
    max_length, items = case
    lengths = np.array(items, dtype=np.int64)
    pieces = np.arange(len(items), dtype=np.int64)
    placed, offsets = pack_pieces(pieces, lengths, max_length, np.random.default_rng(seed))
    assert sorted(placed.tolist()) == pieces.tolist()
    assert offsets.size == pack(lengths, max_length)[1].size


def test_best_fit_beats_next_fit_where_it_should() -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(
        generator.lognormal(5.0, 0.4, 20_000).astype(np.int64), 1, 1024
    )  # like short questions and answers
    _, offsets = pack(lengths, 1024)
    fill = lengths.sum() / ((offsets.size - 1) * 1024)
    assert fill > 0.98


def test_the_repeats_of_a_document_do_not_share_a_row() -> None:
    pieces = np.repeat(np.arange(100, dtype=np.int64), 3)
    placed, offsets = pack_pieces(pieces, np.full(100, 100, dtype=np.int64), 300, np.random.default_rng(0))
    rows = [placed[a:b] for a, b in itertools.pairwise(offsets)]
    shared = sum(len(set(row.tolist())) < len(row) for row in rows)
    assert shared < 10  # in the order of the pieces it would be all 100


def test_400_000_documents_pack_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(1, 2049, 400_000)
    started = time.process_time()
    pack(lengths, 4096)
    assert time.process_time() - started < 20  # 1.5 s alone on a core; the rest is for busy machines


def test_an_index_comes_back_as_it_was(tmp_path: Path) -> None:
    arrays = [np.arange(i, dtype=np.int64) for i in range(8)]
    PackIndex(*arrays).save(tmp_path / "packs.npz")
    read = PackIndex.load(tmp_path / "packs.npz")
    assert np.array_equal(read.documents, arrays[0])
    assert np.array_equal(read.validation_offsets, arrays[7])
    assert np.array_equal(PackIndex(*[np.ones(2, dtype=np.int64)] * 8).lengths, [0, 0])
