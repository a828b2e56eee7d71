"""The stage: from a configuration to a prepared folder.

In: `Config`, the model's folder.  Out: `PreparedDataset`, a folder whose manifest is written last.

    sources ──read──▶ raw rows ──tokenise──▶ documents/*.arrow ──select, pack──▶ packs.npz ──▶ tokenizer/, manifest.json
       └──fingerprint: the same as the folder's? then nothing is done

Everything is written to a folder beside `out`, which takes its name at the end. No process group exists yet.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.artifacts import IGNORE_INDEX, PreparedDataset, RenderedSample, SourceSummary, sync_folder
from foretune.config.schema import Config
from foretune.data.chat_template import ChatTemplate, choose_template, load_tokenizer
from foretune.data.formats import detect
from foretune.data.loader import DocumentStore
from foretune.data.packing import Ints
from foretune.data.selection import Selection, Wanted, heads, select
from foretune.data.sources import FoundSource, RawTable, find_source, fingerprint_parts, hash_of, read_source
from foretune.data.tokenise import BatchTokeniser, Encoder, Recipe, num_processes, tokenise
from foretune.errors import UserError
from foretune.model.shape import read_shape

_OWN_NAMES = {"documents", "tokenizer", "packs.npz", PreparedDataset.file_name}
_MOST_REASONS = 20
Say = Callable[[str], None]


@dataclass
class _Work:
    """One table of a source, with the form of each of its files."""

    position: int  # of the source in the configuration
    found: FoundSource
    table: RawTable
    forms: list[str]


@dataclass
class _Tokenised:
    """What tokenising left in the scratch folder, and what is known of its documents."""

    store: DocumentStore
    source_of: Ints
    is_text: NDArray[np.bool_]
    summaries: list[dict[str, Any]]
    dropped: Counter[str]


def prepare(
    config: Config, *, model_folder: Path, out: Path, on_progress: Callable[[str], None] | None = None
) -> PreparedDataset:
    """Clean, template, tokenise and pack the data of a configuration.

    Args:
        model_folder: a Hugging Face folder with config.json and a tokenizer. out: the folder to leave.
        on_progress: called with one line at a time for people.

    Returns:
        The manifest of `out`: of the folder as it was, if what it was made of has not changed.

    Raises:
        UserError: data, model or options can't be used; says which, and the mend.
    """
    say: Say = on_progress or (lambda line: None)
    started = time.monotonic()
    found = [find_source(source, position=i) for i, source in enumerate(config.data.sources)]
    shape = read_shape(model_folder)
    limit = shape.context_length
    _check_max_length(config.train.max_length, limit)
    _refuse_foreign_folder(out)
    parts = fingerprint_parts(config, found, model_folder, shape.vocab_size, limit)
    existing = _reusable(out, parts, say)
    if existing is not None:
        return existing
    tokenizer = load_tokenizer(model_folder, trust_remote_code=config.trust_remote_code)
    scratch = _scratch_folder(out)
    try:
        work = _read_all(config, found, scratch / "raw", say)
        is_chat = any(form != "text" for item in work for form in item.forms)
        template = choose_template(tokenizer, file=config.data.chat_template, needed=is_chat)
        # With the template that is used, so that evaluation, export and serving can't use another.
        tokenizer.save_pretrained(str(scratch / "tokenizer"))
        recipe = Recipe(
            folder=str(scratch / "tokenizer"),
            has_chats=is_chat,
            train_on_prompt=config.data.train_on_prompt,
            vocab_size=shape.vocab_size,
            model=str(model_folder),
            trust_remote_code=config.trust_remote_code,
        )
        encoder = Encoder(tokenizer, template, recipe)
        tokenised = _tokenise_all(config, work, encoder, scratch / "documents", say)
        wanted = Wanted(
            max_length=None if config.train.max_length == "auto" else config.train.max_length,
            context_length=limit,
            deduplicate=config.data.deduplicate,
            validation=config.evaluate.validation,
            seed=config.train.seed,
            weights=[source.weight for source in config.data.sources],
        )
        say("packing")
        selection = select(tokenised.store, tokenised.source_of, tokenised.is_text, wanted)
        selection.dropped = _fewer(selection.dropped + tokenised.dropped)
        _refuse_nothing(config, selection, tokenised)
        selection.index.save(scratch / "packs.npz")
        shutil.rmtree(scratch / "raw", ignore_errors=True)
        prepared = _manifest(
            selection,
            tokenised,
            template,
            tokenizer,
            parts=parts,
            vocab_size=shape.vocab_size,
            notes=[note for source in found for note in source.notes],
            seconds=time.monotonic() - started,
        )
        prepared.write(scratch / PreparedDataset.file_name)
        _put_in_place(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    rows = f"{prepared.packs} rows of {prepared.max_length}"
    say(f"prepared {prepared.documents} documents, {prepared.tokens} tokens, {rows}")
    return prepared


# ── the fingerprint ─────────────────────────────────────────────────────────────────────────────────────────────────


def _reusable(out: Path, parts: dict[str, str], say: Say) -> PreparedDataset | None:
    """The folder's manifest if it was made of the same; says why not otherwise."""
    manifest = out / PreparedDataset.file_name
    if not manifest.is_file():
        return None
    try:
        existing = PreparedDataset.read(manifest)
    except UserError as error:
        say(f"preparing again: the manifest {error.problem}")
        return None
    before = existing.fingerprint_parts
    changed = [name for name in sorted({*parts, *before}) if parts.get(name) != before.get(name)]
    if changed:
        say(f"preparing again: changed since then: {', '.join(changed)}")
        return None
    if not (out / "packs.npz").is_file() or not any((out / "documents").glob("*.arrow")):
        say("preparing again: files of the folder are missing")
        return None
    say(f"prepared data is reused: {existing.documents} documents, nothing it was made of has changed")
    return existing


def _check_max_length(asked: int | str, limit: int) -> None:
    if not isinstance(asked, int):
        return
    if asked > limit:
        problem = f"is more than the model's context of {limit} tokens"
        raise UserError("train.max_length", asked, problem, f"set it to at most {limit}, or leave it out")
    if asked < 2:
        raise UserError("train.max_length", asked, "leaves nothing to predict", "set it to 2 or more")


def _refuse_foreign_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError("--out", str(out), "is a file", "give a folder that is new or empty")
    foreign = {item.name for item in out.iterdir()} - _OWN_NAMES if out.is_dir() else set()
    if foreign:
        problem = f"holds other things ({', '.join(sorted(foreign)[:3])}), which would be replaced"
        raise UserError("--out", str(out), problem, "give a folder that is new or empty")


# ── reading and tokenising ──────────────────────────────────────────────────────────────────────────────────────────


def _read_all(config: Config, found: list[FoundSource], scratch: Path, say: Say) -> list[_Work]:
    """All sources to Arrow, and the form of each file, told from its first rows."""
    work: list[_Work] = []
    for i, source in enumerate(found):
        say(f"reading {source.source.path}")
        tables = read_source(source, scratch / str(i))
        work += [_Work(i, source, table, _forms(source, table, config)) for table in tables]
        seen = sorted({form for item in work if item.position == i for form in item.forms})
        columns = sorted(set().union(*(names for table in tables for names in table.columns)))
        say(f"{source.source.path}: form {', '.join(seen)} (columns {', '.join(columns)})")
    return work


def _tokenise_all(config: Config, work: list[_Work], encoder: Encoder, folder: Path, say: Say) -> _Tokenised:
    """All tables to documents/*.arrow, in their order."""
    for i, item in enumerate(work):
        num_proc = num_processes(config.data.num_proc, item.table.bytes)
        processes = "" if num_proc == 1 else f" in {num_proc} processes"
        say(f"tokenising {len(item.table.dataset)} rows of {item.found.source.path}{processes}")
        tokeniser = BatchTokeniser(
            encoder,
            kind=item.table.kind,
            forms=item.forms,
            files=item.table.files,
            field=item.found.field,
            system=config.data.system,
        )
        tokenise(item.table, tokeniser, str(folder / f"{i:05d}"), num_proc=num_proc)
    store = DocumentStore(folder)
    counts = [len(item.table.dataset) for item in work]
    assert len(store) == sum(counts), "every raw row has one stored document, be it empty"
    source_of = np.repeat([item.position for item in work], counts).astype(np.int64)
    is_text = np.concatenate([_is_text(item.table, item.forms) for item in work])
    rows = [int(np.unique(heads(store)[source_of == i]).size) for i in range(len(config.data.sources))]
    summaries: list[dict[str, Any]] = [
        {
            "path": source.path,
            "format": " + ".join(sorted({form for item in work if item.position == i for form in item.forms})),
            "weight": source.weight,
            "rows_read": rows[i],
            "columns": sorted(
                set().union(*(names for item in work if item.position == i for names in item.table.columns))
            ),
        }
        for i, source in enumerate(config.data.sources)
    ]
    reasons = store.column("reason").value_counts().to_pylist()
    dropped = Counter({item["values"]: item["counts"] for item in reasons if item["values"] is not None})
    return _Tokenised(store, source_of, is_text, summaries, dropped)


def _forms(source: FoundSource, table: RawTable, config: Config) -> list[str]:
    """The form of each file of a table."""
    wanted = source.source.format if source.source.format != "auto" else config.data.format
    if table.kind == "parts":
        if wanted not in ("auto", "text"):
            mend = "leave the format out for plain texts, or write the rows as JSON lines"
            raise UserError(source.field, table.files[0], f"is a plain text, not of the form {wanted!r}", mend)
        return ["text"] * len(table.files)
    paths = table.files if len(table.columns) == len(table.files) else [source.source.path]
    return [
        detect(names, wanted=wanted, field=source.field, path=path)
        for names, path in zip(table.columns, paths, strict=True)
    ]


def _is_text(table: RawTable, forms: list[str]) -> NDArray[np.bool_]:
    if table.kind == "lines":
        per_file: NDArray[np.bool_] = np.array([form == "text" for form in forms])
        flags: NDArray[np.bool_] = per_file[np.asarray(table.dataset.with_format("numpy")["file"][:])]
        return flags
    return np.full(len(table.dataset), forms[0] == "text")


# ── what is left behind ─────────────────────────────────────────────────────────────────────────────────────────────


def _refuse_nothing(config: Config, selection: Selection, tokenised: _Tokenised) -> None:
    if selection.index.pack_pieces.size:
        return
    rows = sum(summary["rows_read"] for summary in tokenised.summaries)
    reasons = (
        "; ".join(f"{count} x {reason}" for reason, count in selection.dropped.most_common(5)) or "there were none"
    )
    value = ", ".join(source.path for source in config.data.sources)
    problem = f"nothing to learn is left of its {rows} rows ({reasons})"
    raise UserError(
        "data", value, problem, "look at the rows and their columns; raise train.max_length if rows were too long"
    )


def _fewer(dropped: Counter[str]) -> Counter[str]:
    """The commonest reasons, and the rest together: some name what stands in the row, and could be as many as rows."""
    kept = Counter(dict(dropped.most_common(_MOST_REASONS)))
    rest = dropped.total() - kept.total()
    return kept + Counter({"other reasons": rest})


def _manifest(
    selection: Selection,
    tokenised: _Tokenised,
    template: ChatTemplate,
    tokenizer: Any,
    *,
    parts: dict[str, str],
    vocab_size: int,
    notes: list[str],
    seconds: float,
) -> PreparedDataset:
    index = selection.index
    packs = index.pack_offsets.size - 1
    tokens = int(index.lengths[index.pack_pieces].sum())
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return PreparedDataset(
        fingerprint=hash_of(parts),
        fingerprint_parts=parts,
        max_length=selection.max_length,
        max_length_reason=selection.max_length_reason,
        vocab_size=vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad if pad < vocab_size else tokenizer.eos_token_id,
        stop_token_ids=template.stop_token_ids,
        chat_template=template.origin,
        sources=[
            SourceSummary(**summary, documents=selection.documents_of_source[i])
            for i, summary in enumerate(tokenised.summaries)
        ],
        rows_read=sum(summary["rows_read"] for summary in tokenised.summaries),
        documents=selection.documents,
        validation_documents=selection.validation_documents,
        dropped=dict(selection.dropped.most_common()),
        duplicates=selection.duplicates,
        truncated_documents=selection.truncated_documents,
        truncated_tokens=selection.truncated_tokens,
        split_documents=selection.split_documents,
        tokens=tokens,
        target_tokens=int(index.targets[index.pack_pieces].sum()),
        validation_tokens=int(index.lengths[index.validation_pieces].sum()),
        validation_target_tokens=int(index.targets[index.validation_pieces].sum()),
        packs=packs,
        fill=tokens / (packs * selection.max_length),
        longest_document=selection.longest_document,
        samples=_samples(selection, tokenised.store, tokenizer),
        notes=[*notes, *template.notes, *selection.notes],
        seconds=round(seconds, 3),
    )


def _samples(selection: Selection, store: DocumentStore, tokenizer: Any) -> list[RenderedSample]:
    """Three training documents as text: of the first, the middle and the last."""
    index = selection.index
    pieces = np.unique(index.pack_pieces)
    chosen = np.unique(pieces[[0, pieces.size // 2, pieces.size - 1]])
    samples = []
    for piece in chosen.tolist():
        ids, labels = store.read(int(index.documents[piece]), int(index.starts[piece]), int(index.stops[piece]))
        learned = np.append(False, labels[1:] != IGNORE_INDEX)
        bounds = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), ids.size]
        pieces_of_text = [
            (str(tokenizer.decode(ids[start:stop].tolist(), skip_special_tokens=False)), bool(learned[start]))
            for start, stop in itertools.pairwise(bounds)
        ]
        samples.append(
            RenderedSample(pieces=pieces_of_text, tokens=int(ids.size), target_tokens=int(index.targets[piece]))
        )
    return samples


def _scratch_folder(out: Path) -> Path:
    """A new folder beside `out`. What killed processes left there is removed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{out.name}.*.*"):
        name, _, kind = left.name.rpartition(".")
        pid = name.rpartition(".")[2]
        if kind in ("partial", "old") and pid.isdigit() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    scratch = out.with_name(f".{out.name}.{os.getpid()}.partial")
    (scratch / "documents").mkdir(parents=True)
    return scratch


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _put_in_place(scratch: Path, out: Path) -> None:
    """Give the finished folder its name. An older one steps aside first: two folders can't be swapped in one step."""
    for file in scratch.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(aside)
    scratch.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(aside, ignore_errors=True)
