"""The loader: which documents a step sees, and which tokens predict which, whatever the layout."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretune.artifacts import IGNORE_INDEX
from foretune.config import parse_config
from foretune.data import Loader, MicroBatch, open_loader
from foretune.data.loader import DocumentStore
from foretune.data.packing import PackIndex
from foretune.data.prepare import prepare
from foretune.errors import UserError

STORIES = Path(__file__).parents[2] / "models" / "stories260K"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 150 short questions and answers of various lengths and a few long texts."""
    place = tmp_path_factory.mktemp("loader")
    generator = np.random.default_rng(0)
    words = ["cat", "dog", "sun", "said", "went", "home", "the", "little", "girl", "Tim"]

    def sentence(length: int) -> str:
        return " ".join(generator.choice(words, length))

    chats = [{"question": f"{sentence(3 + i % 9)} {i}?", "answer": sentence(1 + i % 40)} for i in range(150)]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    texts = [{"text": f"{sentence(300)} {i}"} for i in range(12)]
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    data = [str(place / "chats.jsonl"), str(place / "texts.jsonl")]
    config = parse_config(
        {"model": "unused", "data": data, "train": {"max_length": 128}, "evaluate": {"validation": 0.1}}
    )
    prepare(config, model_folder=STORIES, out=place / "data")
    return place / "data"


def loader_of(folder: Path, **layout: Any) -> Loader:
    wanted = {"seed": 0, "global_batch_size": 8, "rank": 0, "world_size": 1, "micro_batch_size": 2, "packing": True}
    return open_loader(folder, **(wanted | layout))


def documents_in(batch: MicroBatch) -> list[int]:
    """Ids of the documents in a micro-batch, once per run of tokens."""
    found = []
    for row in batch.document_ids:
        starts = np.flatnonzero(np.diff(np.concatenate([[-2], row])))
        found += [int(row[start]) for start in starts if row[start] >= 0]
    return found


def gather(folder: Path, step: int, **layout: Any) -> tuple[Counter[int], int, list[tuple[int, int, int]]]:
    """All ranks together: documents, target tokens counted in the arrays, and what they said before."""
    seen: Counter[int] = Counter()
    targets = 0
    said = []
    counts = set()
    for rank in range(layout["world_size"]):
        batch = loader_of(folder, rank=rank, **layout).step(step)
        for micro_batch in batch.micro_batches:
            seen.update(documents_in(micro_batch))
            targets += int((micro_batch.shift_labels != IGNORE_INDEX).sum())
        said.append((batch.target_tokens, batch.tokens, len(batch.documents)))
        counts.add(len(batch.micro_batches))
    assert len(counts) == 1, "every rank takes as many micro-steps"
    assert len(set(said)) == 1, "every rank knows the same totals"
    return seen, targets, said


@settings(max_examples=40, deadline=None)
@given(
    wanted=st.fixed_dictionaries({"seed": st.integers(0, 3), "global_batch_size": st.integers(1, 9)}),
    step=st.integers(0, 40),
    world_size=st.integers(1, 5),
    micro_batch_size=st.integers(1, 5),
    packing=st.booleans(),
)
def test_a_step_s_documents_do_not_depend_on_the_layout(
    folder: Path, *, wanted: dict[str, int], step: int, world_size: int, micro_batch_size: int, packing: bool
) -> None:
    plain = loader_of(folder, **wanted).step(step)
    seen, targets, said = gather(
        folder, step, world_size=world_size, micro_batch_size=micro_batch_size, packing=packing, **wanted
    )
    assert seen == Counter(plain.documents)
    assert targets == plain.target_tokens
    assert said[0] == (plain.target_tokens, plain.tokens, len(plain.documents))


@pytest.mark.parametrize("global_batch_size", [1, 7, 8, 1000])
def test_an_epoch_sees_every_document_once_and_epochs_differ(folder: Path, global_batch_size: int) -> None:
    loader = loader_of(folder, global_batch_size=global_batch_size)
    index = PackIndex.load(folder / "packs.npz")
    epochs = []
    for epoch in range(2):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        epochs.append([document for step in steps for document in loader.step(step).documents])
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(index.pack_pieces.tolist())
    assert max(Counter(epochs[0]).values()) == 1
    assert epochs[0] != epochs[1]
    assert not set(epochs[0]) & set(index.validation_pieces.tolist())


def test_a_step_is_the_same_after_a_fresh_start(folder: Path) -> None:
    loader = loader_of(folder, world_size=2, rank=1)
    walked = [loader.step(step) for step in range(loader.steps_per_epoch + 3)][-1]
    fresh = loader_of(folder, world_size=2, rank=1).step(loader.steps_per_epoch + 2)
    assert walked.documents == fresh.documents
    for before, after in zip(walked.micro_batches, fresh.micro_batches, strict=True):
        assert np.array_equal(before.input_ids, after.input_ids)
        assert np.array_equal(before.shift_labels, after.shift_labels)


@pytest.mark.parametrize("packing", [True, False])
def test_positions_labels_and_documents_agree_with_what_is_stored(folder: Path, packing: bool) -> None:
    loader = loader_of(folder, packing=packing, micro_batch_size=3)
    index = PackIndex.load(folder / "packs.npz")
    store = DocumentStore(folder / "documents")
    for micro_batch in loader.step(1).micro_batches:
        for ids, labels, positions, documents in zip(
            micro_batch.input_ids,
            micro_batch.shift_labels,
            micro_batch.position_ids,
            micro_batch.document_ids,
            strict=True,
        ):
            edges = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), documents.size]
            for start, stop in itertools.pairwise(edges):
                assert positions[start:stop].tolist() == list(range(stop - start))
                piece = int(documents[start])
                if piece < 0:
                    assert stop == documents.size, "padding is at the end"
                    assert set(labels[start:stop].tolist()) <= {IGNORE_INDEX}
                    continue
                stored, stored_labels = store.read(
                    int(index.documents[piece]), int(index.starts[piece]), int(index.stops[piece])
                )
                assert ids[start:stop].tolist() == stored.tolist()
                assert labels[start : stop - 1].tolist() == stored_labels[1:].tolist()
                assert labels[stop - 1] == IGNORE_INDEX, "no document predicts the next one's first token"


def test_packed_rows_have_one_shape_and_others_fit_their_longest(folder: Path) -> None:
    for batch in loader_of(folder).step(0).micro_batches:
        assert batch.input_ids.shape == (2, 128)
        assert batch.input_ids.dtype == np.int64
    for batch in loader_of(folder, packing=False).step(0).micro_batches:
        longest = int((batch.document_ids >= 0).sum(axis=1).max())
        assert batch.input_ids.shape == (2, min(-(-longest // 8) * 8, 128))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_held_out_documents_are_shared_out_once(folder: Path, packing: bool, world_size: int) -> None:
    index = PackIndex.load(folder / "packs.npz")
    shares = [
        loader_of(folder, packing=packing, world_size=world_size, rank=rank).validation() for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    seen = [document for share in shares for batch in share for document in documents_in(batch)]
    assert sorted(seen) == sorted(index.validation_pieces.tolist())
    assert seen


def test_more_ranks_than_rows_gives_empty_rows(folder: Path) -> None:
    batch = loader_of(folder, global_batch_size=1, world_size=4, rank=3).step(0)
    (empty,) = batch.micro_batches
    assert (empty.document_ids == -1).all()
    assert (empty.shift_labels == IGNORE_INDEX).all()
    assert batch.target_tokens > 0


def test_reading_a_row_takes_far_less_than_a_millisecond(folder: Path) -> None:
    loader = loader_of(folder)
    loader.step(0)
    started = time.process_time()
    for step in range(50):
        loader.step(step)
    assert (time.process_time() - started) / (50 * 8) < 1e-3


def test_a_folder_that_was_not_prepared_is_refused(tmp_path: Path, make_config: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="no such file"):
        loader_of(tmp_path)
