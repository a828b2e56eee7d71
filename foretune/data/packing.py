"""Which documents share a row: best-fit-decreasing packing, and the index on disk that says so.

In: lengths of pieces.  Out: `PackIndex`, saved as packs.npz.

    lengths ──longest first──▶ the fullest row that still has room ──▶ rows of at most max_length tokens

A *piece* is a slice of a stored document: the whole of it, or what splitting or truncation left. A *pack* is a list of
pieces.
Best-fit-decreasing needs at most 11/9 of the optimal number of rows + 1 (Johnson 1973).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PackIndex:
    """Every piece, and which pieces each pack holds. All arrays are int64.

    `documents`, `starts`, `stops`, `targets` [pieces]: the stored document, the slice of it, and how many tokens of the
    slice are targets. `pack_pieces` [placed pieces] with `pack_offsets` [packs + 1]: pack p holds
    ``pack_pieces[pack_offsets[p]:pack_offsets[p + 1]]``; the same for the held-out packs. Held-out and training pieces
    share one numbering, and a piece that is repeated by weight stands in several packs.
    """

    documents: Ints
    starts: Ints
    stops: Ints
    targets: Ints
    pack_pieces: Ints
    pack_offsets: Ints
    validation_pieces: Ints
    validation_offsets: Ints

    @property
    def lengths(self) -> Ints:
        return self.stops - self.starts

    def save(self, path: Path) -> None:
        """Write as an uncompressed .npz file."""
        np.savez(path, allow_pickle=False, **{item.name: getattr(self, item.name) for item in fields(self)})

    @classmethod
    def load(cls, path: Path) -> PackIndex:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{item.name: arrays[item.name] for item in fields(cls)})


def pack(lengths: Ints, max_length: int, *, order: Ints | None = None) -> tuple[Ints, Ints]:
    """Pack items into rows by best-fit-decreasing: longest first, each into the fullest row that has room.

    Args:
        lengths: tokens of each item, each between 1 and `max_length`.
        max_length: tokens of a row.
        order: permutation of the items that breaks ties between equal lengths (default: their own order).

    Returns:
        ``(items, offsets)``, int64: row r holds ``items[offsets[r]:offsets[r + 1]]``. Deterministic.

    The rows with c tokens of room are kept in a list per c, and the c that have any as the bits of one integer: the
    smallest room that suffices is its lowest bit at or above the length. A million items at 4096 take half a second.
    """
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= max_length), "an item does not fit a row"
    order = np.arange(lengths.size, dtype=np.int64) if order is None else order
    order = order[np.argsort(-lengths[order], kind="stable")]
    row_of = np.empty(lengths.size, dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    has_room = 0
    num_rows = 0
    placed_in: list[int] = []
    for length in lengths[order].tolist():
        fitting = has_room >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            rows = with_room[room]
            row = rows.pop()
            if not rows:
                has_room ^= 1 << room
        else:
            room, row = max_length, num_rows
            num_rows += 1
        room -= length
        if room:
            if not with_room[room]:
                has_room |= 1 << room
            with_room[room].append(row)
        placed_in.append(row)
    row_of[:] = placed_in
    by_row = np.argsort(row_of, kind="stable")
    offsets = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=offsets[1:])
    return order[by_row], offsets


def pack_pieces(pieces: Ints, lengths: Ints, max_length: int, generator: Any) -> tuple[Ints, Ints]:
    """Pack pieces (ids into `lengths`, repeats allowed); ties between equal lengths are broken by the random generator.

    Random ties keep neighbours of a source, and repeats of one document, from sharing a row.
    """
    items, offsets = pack(lengths[pieces], max_length, order=generator.permutation(pieces.size))
    return pieces[items], offsets
