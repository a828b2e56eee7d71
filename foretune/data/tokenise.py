"""From raw rows to documents: token ids and labels, a batch at a time, in as many processes as asked for.

In: a batch of a `RawTable` (a pyarrow table).  Out: a table with one row per raw row, empty where it was dropped:

    row ──parse, normalise──▶ text ──────────────────▶ ids, end of sequence ────────┬──▶ input_ids, labels, targets,
                          └──▶ conversation ──render──▶ pieces, learned or not ─────┘    digest, reason

Labels are decided by position, never by token id: the end of sequence is a target also where it is the padding token.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.artifacts import IGNORE_INDEX
from foretune.data.chat_template import ChatTemplate, Rendered, choose_template, load_tokenizer
from foretune.data.formats import Conversation, Dropped, Text, normalise
from foretune.data.sources import Kind
from foretune.data.words import WordIds
from foretune.errors import UserError

#: Below this many bytes of rows per process, starting one costs more than it saves.
_BYTES_PER_PROCESS = 4 << 20
Ids = NDArray[np.int32]
Document = tuple[Ids, Ids]  # input_ids, labels


@dataclass(frozen=True)
class Recipe:
    """What an `Encoder` can be made from in another process."""

    folder: str  # the tokenizer, saved with its template
    has_chats: bool
    train_on_prompt: bool
    vocab_size: int  # rows of the model's embedding
    model: str  # for errors
    trust_remote_code: bool


class Encoder:
    """Turns lists of texts and conversations into documents, a whole list in one call of the tokenizer."""

    def __init__(self, tokenizer: Any, template: ChatTemplate, recipe: Recipe) -> None:
        self.tokenizer, self.template, self.recipe = tokenizer, template, recipe
        self._eos = int(tokenizer.eos_token_id)
        self._backend = self._bare_backend()
        self._words = WordIds.of(self._backend) if self._backend is not None else None
        self._cuts_freely = self._joins_cleanly()
        self._has_offsets = bool(tokenizer.is_fast)
        self._anchor = self._ids(["\n"])[0]

    def __reduce__(self) -> tuple[Any, tuple[Recipe]]:
        """Travels as its recipe: pickling a tokenizer of 150,000 tokens takes seconds, a fork has it already."""
        return _encoder_of, (self.recipe,)

    def texts(self, texts: list[str], ends: list[tuple[bool, bool]]) -> list[Document]:
        """Plain texts. `ends`: whether each begins and whether it ends its document (long ones come in parts)."""
        encoded = self.tokenizer(texts, add_special_tokens=True, verbose=False).input_ids if texts else []
        documents: list[Document] = []
        inner = [i for i, (first, _) in enumerate(ends) if not first]
        bare = dict(zip(inner, self._going_on([texts[i] for i in inner]), strict=True))
        for i, (_, last) in enumerate(ends):
            ids = bare.get(i, encoded[i])
            ids = ids[:-1] if ids and ids[-1] == self._eos else ids  # some tokenizers add it themselves
            array = np.array([*ids, self._eos] if last else ids, dtype=np.int32)
            documents.append((array, array))
        return documents

    def conversations(self, rendered: list[Rendered]) -> list[Document]:
        """Rendered conversations. What is learned starts on a token of its own, as it does at inference."""
        if self._cuts_freely or not self._has_offsets:
            return self._by_segments(rendered)
        return self._by_offsets(rendered)

    def check_vocabulary(self, ids: Ids) -> None:
        """Raises `UserError` if the model has no embedding for a token."""
        if ids.size and int(ids.max()) >= self.recipe.vocab_size:
            token = int(ids.max())
            written = self.tokenizer.convert_ids_to_tokens(token)
            problem = (
                f"its tokenizer writes token {token} ({written!r}), but its embedding has {self.recipe.vocab_size} rows"
            )
            mend = "use the tokenizer that belongs to the model, or resize the model's embedding and save it again"
            raise UserError("model", self.recipe.model, problem, mend)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._words is not None:
            slow = [i for i, text in enumerate(texts) if not text.isascii()]
            rest = dict(zip(slow, self._whole([texts[i] for i in slow]), strict=True))
            encode = self._words.encode
            return [rest[i] if i in rest else encode(text) for i, text in enumerate(texts)]
        return self._whole(texts)

    def _whole(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is not None:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        encoded: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        return encoded

    def _bare_backend(self) -> Any:
        """The Rust tokenizer itself, which need not track where tokens stand in the text; None if it gives other ids.

        The wrapper is asked first: it sets truncation, padding and the handling of special tokens.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None) if self.tokenizer.is_fast else None
        if backend is None or not hasattr(backend, "encode_batch_fast"):
            return None
        sample = [" Hello,  world\n", f"a{self.tokenizer.eos_token}b", "数 12345 é"]
        expected = self.tokenizer(sample, add_special_tokens=False, verbose=False).input_ids
        found = [encoding.ids for encoding in backend.encode_batch_fast(sample, add_special_tokens=False)]
        return backend if found == expected else None

    def _joins_cleanly(self) -> bool:
        """Whether pieces may be tokenised apart: not if a tokenizer puts a space before each text (SentencePiece)."""
        newline, word, both = self._ids(["\n", "Hello", "\nHello"])
        return newline + word == both

    def _by_segments(self, rendered: list[Rendered]) -> list[Document]:
        """Each piece tokenised for itself: so the prompt's tokens are those of inference."""
        texts: list[str] = []
        learned: list[bool] = []
        counts = []
        for item in rendered:
            segments = _segments(item)
            texts += [text for text, _ in segments]
            learned += [target for _, target in segments]
            counts.append(len(segments))
        encoded = self._ids(texts)
        if not self._cuts_freely:
            starts = set(np.cumsum([0, *counts]).tolist())
            inner = [i for i in range(len(texts)) if i not in starts]
            for i, going_on in zip(inner, self._going_on([texts[i] for i in inner]), strict=True):
                encoded[i] = going_on
        documents = []
        at = 0
        for item, count in zip(rendered, counts, strict=True):
            pieces = encoded[at : at + count]
            targets = learned[at : at + count]
            at += count
            lengths = [len(piece) for piece in pieces]
            ids = np.array([token for piece in pieces for token in piece], dtype=np.int32)
            documents.append(self._finish(item, ids, np.repeat(targets, lengths)))
        return documents

    def _going_on(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that go on from something before them.

        Where the tokenizer puts a space before each text, they are tokenised after an anchor, a newline, that takes it.
        """
        encoded = self._ids(texts)
        if self._cuts_freely:
            return encoded
        width = len(self._anchor)
        anchored = self._ids(["\n" + text for text in texts])
        return [
            after[width:] if after[:width] == self._anchor else own
            for own, after in zip(encoded, anchored, strict=True)
        ]

    def _by_offsets(self, rendered: list[Rendered]) -> list[Document]:
        """Whole texts tokenised, tokens learned by where their characters lie; rows where one straddles are cut."""
        if not rendered:
            return []
        texts = [item.text for item in rendered]
        encoding = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        documents: list[Document | None] = []
        again: list[int] = []
        for i, item in enumerate(rendered):
            offsets = np.array(encoding["offset_mapping"][i], dtype=np.int64).reshape(-1, 2)
            mask = np.zeros(len(offsets), dtype=bool)
            straddles = False
            for start, end in item.spans:
                straddles |= bool(np.any((offsets[:, 0] < start) & (offsets[:, 1] > start)))
                straddles |= bool(np.any((offsets[:, 0] < end) & (offsets[:, 1] > end)))
                mask |= (offsets[:, 0] >= start) & (offsets[:, 0] < end)
            if straddles:
                again.append(i)
            documents.append(self._finish(item, np.array(encoding["input_ids"][i], dtype=np.int32), mask))
        for i, document in zip(again, self._by_segments([rendered[i] for i in again]), strict=True):
            documents[i] = document
        return [document for document in documents if document is not None]

    def _finish(self, item: Rendered, ids: Ids, learned: NDArray[np.bool_]) -> Document:
        if item.append_eos:
            ids, learned = np.append(ids, np.int32(self._eos)), np.append(learned, True)
        if self.recipe.train_on_prompt:
            return ids, ids
        return ids, np.where(learned, ids, np.int32(IGNORE_INDEX)).astype(np.int32)


#: Encoders by recipe, as long as `tokenise` runs. A process that is forked then has its parent's.
_ENCODERS: dict[Recipe, Encoder] = {}


def _encoder_of(recipe: Recipe) -> Encoder:
    if recipe not in _ENCODERS:
        tokenizer = load_tokenizer(Path(recipe.folder), trust_remote_code=recipe.trust_remote_code)
        template = choose_template(tokenizer, file=None, needed=recipe.has_chats)
        _ENCODERS[recipe] = Encoder(tokenizer, template, recipe)
    return _ENCODERS[recipe]


def _segments(item: Rendered) -> list[tuple[str, bool]]:
    segments = []
    at = 0
    for start, end in item.spans:
        segments += [(item.text[at:start], False), (item.text[start:end], True)]
        at = end
    return segments  # a rendered text ends with its last span


@dataclass
class BatchTokeniser:
    """What runs in the processes: one batch of raw rows to documents. Picklable."""

    encoder: Encoder
    kind: Kind
    forms: list[str]  # per file of the table
    files: list[str]
    field: str  # dotted key of the source, for errors
    system: str | None

    def __call__(self, batch: Any) -> Any:
        """Raises `UserError` for broken JSON (file and line) and for token ids that the model has no embedding for."""
        documents: list[Document | None] = []
        reasons: list[str | None] = []
        texts: list[tuple[int, str, tuple[bool, bool]]] = []
        chats: list[tuple[int, Rendered]] = []
        ends: list[tuple[bool, bool]] = []
        for i, (row, form, end) in enumerate(self._rows(batch)):
            outcome: Any = row if isinstance(row, Dropped) else normalise(row, form, system=self.system)
            if isinstance(outcome, Conversation):
                outcome = self.encoder.template.render(outcome)
            documents.append(None)
            ends.append(end)
            reasons.append(outcome.reason if isinstance(outcome, Dropped) else None)
            if isinstance(outcome, Text):
                texts.append((i, outcome.text, end))
            elif isinstance(outcome, Rendered):
                chats.append((i, outcome))
        made = self.encoder.texts([text for _, text, _ in texts], [end for _, _, end in texts])
        for (i, _, _), document in zip(texts, made, strict=True):
            documents[i] = document
        for (i, _), document in zip(chats, self.encoder.conversations([chat for _, chat in chats]), strict=True):
            documents[i] = document
        return self._table(documents, reasons, ends)

    def _rows(self, batch: Any) -> list[tuple[object, str, tuple[bool, bool]]]:
        """``(row, form, (begins, ends its document))`` of each raw row."""
        whole = (True, True)
        if self.kind == "columns":
            return [(row, self.forms[0], whole) for row in batch.to_pylist()]
        if self.kind == "parts":
            columns = (batch.column(name).to_pylist() for name in ("text", "first", "last"))
            # A part that is blank is still a part: only a file that is blank as a whole is an empty row.
            return [
                (
                    {"text": text} if text.strip() or not (first and last) else Dropped("empty text"),
                    "text",
                    (first, last),
                )
                for text, first, last in zip(*columns, strict=True)
            ]
        columns = (batch.column(name).to_pylist() for name in ("row", "file", "line"))
        return [
            (self._parse(row, file, line), self.forms[file], whole) for row, file, line in zip(*columns, strict=True)
        ]

    def _parse(self, row: str, file: int, line: int) -> object:
        try:
            value: object = json.loads(row)
        except (ValueError, RecursionError) as error:
            where = f"{self.files[file]}:{line}"
            problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(self.field, where, f"is not JSON ({problem})", "mend that line") from None
        if "\\ud" in row or "\\uD" in row:  # half of a pair that JSON writes a character in: no text, no tokens
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                return Dropped("broken Unicode (half a surrogate pair)")
        return value

    def _table(self, documents: list[Document | None], reasons: list[str | None], ends: list[tuple[bool, bool]]) -> Any:
        import pyarrow as pa

        empty: Document = (np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32))
        kept = [document or empty for document in documents]
        targets = [int(np.count_nonzero(labels[1:] != IGNORE_INDEX)) for _, labels in kept]
        for i, (document, count) in enumerate(zip(documents, targets, strict=True)):
            if document is not None and count == 0:
                kept[i], reasons[i] = empty, "no target tokens"
        lengths = np.array([ids.size for ids, _ in kept], dtype=np.int64)
        offsets = np.zeros(len(kept) + 1, dtype=np.int32)
        np.cumsum(lengths, out=offsets[1:])
        ids = np.concatenate([ids for ids, _ in kept]) if kept else empty[0]
        labels = np.concatenate([labels for _, labels in kept]) if kept else empty[0]
        self.encoder.check_vocabulary(ids)
        digests = [hashlib.blake2b(a.tobytes() + b.tobytes(), digest_size=16).digest() for a, b in kept]
        return pa.table(
            {
                "input_ids": pa.ListArray.from_arrays(offsets, ids),
                "labels": pa.ListArray.from_arrays(offsets, labels),
                "targets": pa.array(targets, pa.int32()),
                "digest": pa.array(digests, pa.binary()),
                "reason": pa.array(reasons, pa.string()),
                "first": pa.array([first for first, _ in ends], pa.bool_()),
                "last": pa.array([last for _, last in ends], pa.bool_()),
            }
        )


def num_processes(asked: int | str, size: int) -> int:
    """As many as asked for; else as many cores as there are, each with enough of the `size` bytes of rows to pay."""
    if isinstance(asked, int):
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, size // _BYTES_PER_PROCESS))


def tokenise(table: Any, tokeniser: BatchTokeniser, target: str, *, num_proc: int) -> None:
    """Run a `BatchTokeniser` over a `RawTable`, writing Arrow files that begin with `target` (a path without suffix).

    With one process the tokenizer's own threads use the cores; with several, each has one thread.
    """
    import datasets

    dataset = table.dataset
    rows = len(dataset)
    per_row = max(1, table.bytes // max(1, rows))
    batch_size = max(1, min(1000, (8 << 20) // per_row))
    num_proc = min(num_proc, rows)
    # The tokenizers library reads this when a process forks, and otherwise prints a warning per process.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    if num_proc > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _ENCODERS[tokeniser.encoder.recipe] = tokeniser.encoder
    was_shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of any fork beside threads; the children here use no lock that a thread could hold.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            dataset.with_format("arrow").map(
                tokeniser,
                batched=True,
                batch_size=batch_size,
                writer_batch_size=batch_size,
                remove_columns=dataset.column_names,
                num_proc=num_proc if num_proc > 1 else None,
                load_from_cache_file=False,
                cache_file_name=f"{target}.arrow",
                new_fingerprint="foretune",
            )
    finally:
        del _ENCODERS[tokeniser.encoder.recipe]
        if was_shown:
            datasets.enable_progress_bars()
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
