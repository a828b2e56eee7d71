"""From a step number to the arrays a rank trains on: a pure function, no state but what is on disk.

In: a prepared folder (memory-mapped), seed, global batch size, rank layout.  Out: `StepBatch`es.

    step ──divmod──▶ (epoch, k) ──permutation(seed, epoch)──▶ the packs of global batch k ──layout──▶ this rank's rows

Which packs a step sees depends on the seed and the global batch size alone; the rank layout only deals them out. So a
run that resumes, on as many ranks or on others, computes its next batch instead of remembering it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from foretune.artifacts import IGNORE_INDEX, PreparedDataset
from foretune.data.packing import Ints, PackIndex
from foretune.errors import MachineFault

#: Rows that are not packed are padded to a multiple of this: fewer shapes, and what matrix units like.
_PAD_TO = 8


@dataclass(frozen=True)
class MicroBatch:
    """What one rank sees in one forward pass. All int64 [rows, length].

    `shift_labels[b, t]` is the token that position t must predict: the next of the same document, or `IGNORE_INDEX`.
    `position_ids` restart at 0 at every document and at the padding. `document_ids`: whose token it is (-1: padding).
    """

    input_ids: Ints
    shift_labels: Ints
    position_ids: Ints
    document_ids: Ints


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step. The counts are of the whole global batch, known before the first forward pass."""

    micro_batches: list[MicroBatch]  # of this rank; as many on every rank
    target_tokens: int
    tokens: int
    rows: int
    documents: list[int]  # global ids of the batch's documents, in the order of its packs


class DocumentStore:
    """The stored documents, memory-mapped. Reading one touches its own pages only."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self._columns: list[Any] = []
        starts = [0]
        for file in sorted(folder.glob("*.arrow")):
            for batch in pa.ipc.open_stream(pa.memory_map(str(file))).read_all().to_batches():
                self._columns.append(batch)
                starts.append(starts[-1] + batch.num_rows)
        self._starts = np.array(starts, dtype=np.int64)
        self._lists = [
            tuple(_list_arrays(batch.column(name)) for name in ("input_ids", "labels")) for batch in self._columns
        ]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> Any:
        """A whole column as a `pyarrow.ChunkedArray` (for small columns: counts, digests, reasons)."""
        import pyarrow as pa

        arrays = [batch.column(name) for batch in self._columns]
        return pa.chunked_array(arrays) if arrays else pa.chunked_array([], type=pa.null())

    def lengths(self) -> Ints:
        """Tokens of each document, int64 [documents]."""
        parts = [np.diff(lists[0][0]).astype(np.int64) for lists in self._lists]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def read(self, document: int, start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """``(input_ids, labels)`` of a document's slice, int32 views of the file. Labels are not shifted."""
        chunk = int(np.searchsorted(self._starts, document, side="right")) - 1
        row = document - int(self._starts[chunk])
        (offsets, ids), (label_offsets, labels) = self._lists[chunk]
        first, label_first = int(offsets[row]), int(label_offsets[row])
        return ids[first + start : first + stop], labels[label_first + start : label_first + stop]


def _list_arrays(column: Any) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Offsets and values of a list<int32> column as numpy views (`to_numpy` would import pandas, half a second)."""
    offsets, values = np.from_dlpack(column.offsets), np.from_dlpack(column.values)
    return cast("NDArray[np.int32]", offsets), cast("NDArray[np.int32]", values)


class Loader:
    """Batches by step number. Build it with `open_loader`."""

    def __init__(
        self,
        store: DocumentStore,
        index: PackIndex,
        *,
        max_length: int,
        pad_token_id: int,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        packing: bool,
    ) -> None:
        assert 0 <= rank < world_size, "no such rank"
        assert min(global_batch_size, micro_batch_size) >= 1, "sizes start at 1"
        self._store, self._index, self._lengths = store, index, index.lengths
        self._max_length, self._pad = max_length, pad_token_id
        self._seed, self._global_batch_size, self._packing = seed, global_batch_size, packing
        self._rank, self._world_size, self._micro_batch_size = rank, world_size, micro_batch_size
        self._num_packs = index.pack_offsets.size - 1
        self._permutation: tuple[int, Ints] = (-1, np.zeros(0, dtype=np.int64))
        self.steps_per_epoch = -(-self._num_packs // global_batch_size)
        self.validation_rows = index.validation_offsets.size - 1

    def step(self, step: int) -> StepBatch:
        """The batch of a step, counted from 0. Epochs follow each other; the last batch of an epoch may be smaller."""
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self._global_batch_size
        packs = self._epoch(epoch)[position * size : (position + 1) * size]
        index = self._index
        contents = [index.pack_pieces[index.pack_offsets[p] : index.pack_offsets[p + 1]] for p in packs.tolist()]
        pieces = np.concatenate(contents)
        return StepBatch(
            micro_batches=self._deal(contents),
            target_tokens=int(index.targets[pieces].sum()),
            tokens=int(self._lengths[pieces].sum()),
            rows=len(contents) if self._packing else int(pieces.size),
            documents=pieces.tolist(),
        )

    def validation(self, most_rows: int | None = None) -> list[MicroBatch]:
        """This rank's share of the held-out documents, in a fixed order; as many micro-batches on every rank.

        `most_rows`: of the held-out packs, over all ranks, only the first so many.
        """
        index = self._index
        offsets = index.validation_offsets[: None if most_rows is None else most_rows + 1].tolist()
        return self._deal([index.validation_pieces[start:stop] for start, stop in pairwise(offsets)])

    def first_documents(self, count: int) -> list[Ints]:
        """Tokens (int64) of up to `count` documents of at least two tokens, from step 0 on; the same on every rank."""
        found: list[Ints] = []
        for pack in self._epoch(0).tolist():
            for piece in self._index.pack_pieces[self._index.pack_offsets[pack] : self._index.pack_offsets[pack + 1]]:
                if self._lengths[piece] >= 2:
                    found.append(self._read(int(piece))[0].astype(np.int64))
                if len(found) == count:
                    return found
        return found

    def _epoch(self, epoch: int) -> Ints:
        if self._permutation[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._permutation = (epoch, generator.permutation(self._num_packs))
        return self._permutation[1]

    def _deal(self, contents: list[Ints]) -> list[MicroBatch]:
        """Deal rows out: row r goes to micro-step r // (ranks x rows), there round the ranks.

        Rows that are not packed are dealt longest first, so that the rows of one forward pass are of like length. Every
        rank gets the same number of micro-batches; missing rows are empty ones, which have no target.
        """
        if not self._packing:
            single = [piece for content in contents for piece in content.tolist()]
            single.sort(key=lambda piece: -int(self._lengths[piece]))  # stable: the same on every rank
            contents = [np.array([piece]) for piece in single]
        per_micro_step = self._world_size * self._micro_batch_size
        micro_batches = []
        for first in range(0, len(contents), per_micro_step):
            rows = contents[first : first + per_micro_step][self._rank :: self._world_size]
            micro_batches.append(self._build(rows))
        return micro_batches

    def _build(self, rows: list[Ints]) -> MicroBatch:
        length = self._max_length
        if not self._packing:
            longest = max((int(self._lengths[row].sum()) for row in rows), default=1)
            length = min(-(-longest // _PAD_TO) * _PAD_TO, self._max_length)
        shape = (self._micro_batch_size, length)
        input_ids = np.full(shape, self._pad, dtype=np.int64)
        shift_labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        position_ids = np.broadcast_to(np.arange(length, dtype=np.int64), shape).copy()
        document_ids = np.full(shape, -1, dtype=np.int64)
        counting = np.arange(length, dtype=np.int64)
        for b, row in enumerate(rows):
            at = 0
            for piece in row.tolist():
                ids, labels = self._read(piece)
                end = at + ids.size
                input_ids[b, at:end] = ids
                shift_labels[b, at : end - 1] = labels[1:]
                position_ids[b, at:end] = counting[: ids.size]
                document_ids[b, at:end] = piece
                at = end
            position_ids[b, at:] = counting[: length - at]
        return MicroBatch(input_ids, shift_labels, position_ids, document_ids)

    def _read(self, piece: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Tokens and labels of a piece.

        Raises:
            MachineFault: it can't be read; the document is named.
        """
        index = self._index
        document = int(index.documents[piece])
        try:
            return self._store.read(document, int(index.starts[piece]), int(index.stops[piece]))
        except (OSError, ValueError, IndexError, KeyError) as error:
            text = f"document {document} of the prepared data can't be read: {error}"
            raise MachineFault(text, kind="data") from error


def open_loader(
    folder: Path,
    *,
    seed: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    packing: bool = True,
) -> Loader:
    """Open a prepared folder for one rank.

    Args:
        folder: what `prepare` wrote. seed: orders the packs of each epoch.
        global_batch_size: packs per optimizer step, over all ranks.
        micro_batch_size: rows per forward pass of one rank.
        packing: False gives every document of the same global batches a row of its own.

    Raises:
        UserError: the folder holds no prepared data, or of another version.
    """
    prepared = PreparedDataset.read(folder / PreparedDataset.file_name)
    return Loader(
        DocumentStore(folder / "documents"),
        PackIndex.load(folder / "packs.npz"),
        max_length=prepared.max_length,
        pad_token_id=prepared.pad_token_id,
        seed=seed,
        global_batch_size=global_batch_size,
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        packing=packing,
    )
