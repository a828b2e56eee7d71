"""The stage: from a configuration to a prepared folder.

In: `Config`, the model's folder.  Out: `PreparedDataset`, a folder whose manifest is written last.

    sources ──read──▶ raw rows ──tokenise──▶ documents/*.arrow ──select and pack──▶ packs.npz ──▶ tokenizer/, manifest.json
       └──fingerprint: the same as the folder's? then nothing is done

Everything is written to a folder beside `out`, which takes its name at the end. No process group exists yet.
"""

from __future__ import annotations

import hashlib
import json
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
from foretune.data.chat_template import ChatTemplate, choose_template
from foretune.data.formats import detect
from foretune.data.loader import DocumentStore
from foretune.data.packing import Ints
from foretune.data.selection import Selection, Wanted, select
from foretune.data.sources import FoundSource, RawTable, find_source, fingerprint_source, read_source
from foretune.data.tokenise import BatchTokeniser, Encoder, tokenise
from foretune.errors import UserError
from foretune.model.shape import read_shape

#: Raised when the same inputs would give other tokens, packs or files than before.
FORMAT_VERSION = 1
#: Below this many bytes of rows per process, starting the process costs more than it saves.
_BYTES_PER_PROCESS = 16 << 20
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_OWN_NAMES = {"documents", "tokenizer", "packs.npz", PreparedDataset.file_name}
Say = Callable[[str], None]


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
    if isinstance(config.train.max_length, int) and config.train.max_length > limit:
        problem = f"is more than the model's context of {limit} tokens"
        raise UserError(
            "train.max_length", config.train.max_length, problem, f"set it to at most {limit}, or leave it out"
        )
    if isinstance(config.train.max_length, int) and config.train.max_length < 2:
        raise UserError("train.max_length", config.train.max_length, "leaves nothing to predict", "set it to 2 or more")
    _refuse_foreign_folder(out)
    parts = _fingerprint(config, found, model_folder, shape.vocab_size, limit)
    existing = _reusable(out, parts, say)
    if existing is not None:
        return existing
    tokenizer = load_tokenizer(model_folder, trust_remote_code=config.trust_remote_code)
    scratch = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "documents").mkdir(parents=True)
    try:
        template, tokenised = _tokenise_all(config, found, tokenizer, scratch, shape.vocab_size, model_folder, say)
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
        selection.dropped.update(tokenised.dropped)
        _refuse_nothing(config, selection, tokenised)
        selection.index.save(scratch / "packs.npz")
        _save_tokenizer(tokenizer, scratch / "tokenizer")
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
    say(
        f"prepared {prepared.documents} documents, {prepared.tokens} tokens, {prepared.packs} rows of {prepared.max_length}"
    )
    return prepared


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder.

    Raises:
        UserError: (field ``model``) there is none, it can't be loaded, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        custom = trust_remote_code and any(folder.glob("*.py"))
        if not custom:
            mend = "put the tokenizer's files (tokenizer.json, tokenizer_config.json) into the model's folder"
            raise UserError("model", str(folder), "has no tokenizer", mend)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a damaged file raises, from several libraries
        problem = f"its tokenizer can't be loaded ({' '.join(str(error).split())[:300]})"
        raise UserError("model", str(folder), problem, "download the tokenizer's files again") from error
    if tokenizer.eos_token_id is None:
        mend = "set eos_token in the model's tokenizer_config.json"
        raise UserError(
            "model", str(folder), "its tokenizer has no end-of-sequence token, so no answer could end", mend
        )
    return tokenizer


# ── the fingerprint ─────────────────────────────────────────────────────────────────────────────────────────────────


def _fingerprint(
    config: Config, found: list[FoundSource], model_folder: Path, vocab_size: int, context_length: int
) -> dict[str, str]:
    """What the result depends on, part by part, so that a change can be named. Values are hashes."""
    parts = {f"source {source.source.path}": fingerprint_source(source) for source in found}
    files = {name: _hash_file(model_folder / name) for name in _TOKENIZER_FILES if (model_folder / name).is_file()}
    parts["tokenizer"] = _hash(files)
    parts["model's vocabulary and context"] = _hash([vocab_size, context_length])
    chat_template = config.data.chat_template
    path = Path(chat_template).expanduser() if chat_template else None
    parts["chat template"] = _hash_file(path) if path is not None and path.is_file() else _hash(None)
    data = config.data.model_dump(mode="json", include={"format", "train_on_prompt", "system", "deduplicate"})
    options = {
        **{f"data.{key}": value for key, value in data.items()},
        "train.max_length": config.train.max_length,
        "train.seed": config.train.seed,
        "evaluate.validation": config.evaluate.validation,
    }
    parts |= {key: _hash(value) for key, value in options.items()}
    parts["data format of foretune"] = _hash(FORMAT_VERSION)
    return parts


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


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


def _refuse_foreign_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError("--out", str(out), "is a file", "give a folder that is new or empty")
    foreign = {item.name for item in out.iterdir()} - _OWN_NAMES if out.is_dir() else set()
    if foreign:
        problem = f"holds other things ({', '.join(sorted(foreign)[:3])}), which would be replaced"
        raise UserError("--out", str(out), problem, "give a folder that is new or empty")


# ── reading and tokenising ──────────────────────────────────────────────────────────────────────────────────────────


def _tokenise_all(
    config: Config,
    found: list[FoundSource],
    tokenizer: Any,
    scratch: Path,
    vocab_size: int,
    model_folder: Path,
    say: Say,
) -> tuple[ChatTemplate, _Tokenised]:
    """All sources to documents/*.arrow, in their order."""
    tables: list[list[RawTable]] = []
    forms: list[list[list[str]]] = []  # per source, table, file
    for i, source in enumerate(found):
        say(f"reading {source.source.path}")
        tables.append(read_source(source, scratch / "raw" / str(i)))
        forms.append([_forms(source, table, config) for table in tables[-1]])
        seen = sorted({form for of_table in forms[-1] for form in of_table})
        say(f"{source.source.path}: form {', '.join(seen)}")
    is_chat = any(form != "text" for of_source in forms for of_table in of_source for form in of_table)
    template = choose_template(tokenizer, file=config.data.chat_template, needed=is_chat)
    encoder = Encoder(tokenizer, template, train_on_prompt=config.data.train_on_prompt)
    counts: list[int] = []
    origins: list[tuple[int, NDArray[np.bool_]]] = []
    for i, source in enumerate(found):
        for j, table in enumerate(tables[i]):
            num_proc = _num_proc(config, table.bytes)
            processes = "" if num_proc == 1 else f" in {num_proc} processes"
            say(f"tokenising {len(table.dataset)} rows of {source.source.path}{processes}")
            tokeniser = BatchTokeniser(
                encoder,
                table.kind,
                forms[i][j],
                table.files,
                source.field,
                config.data.system,
                vocab_size,
                str(model_folder),
            )
            tokenise(table, tokeniser, str(scratch / "documents" / f"{i:03d}-{j:03d}"), num_proc=num_proc)
            counts.append(len(table.dataset))
            origins.append((i, _is_text(table, forms[i][j])))
    store = DocumentStore(scratch / "documents")
    assert len(store) == sum(counts), "every raw row has one stored document, be it empty"
    source_of = np.repeat([i for i, _ in origins], counts).astype(np.int64)
    reasons = store.column("reason").to_pylist() if len(store) else []
    summaries = [
        {
            "path": source.source.path,
            "format": " + ".join(sorted({form for of_table in forms[i] for form in of_table})),
            "weight": source.source.weight,
            "rows_read": int(np.count_nonzero(source_of == i)),
            "columns": sorted({name for table in tables[i] for names in table.columns for name in names}),
        }
        for i, source in enumerate(found)
    ]
    dropped = Counter(reason for reason in reasons if reason is not None)
    is_text = np.concatenate([flags for _, flags in origins]) if origins else np.zeros(0, dtype=bool)
    return template, _Tokenised(store, source_of, is_text, summaries, dropped)


def _forms(source: FoundSource, table: RawTable, config: Config) -> list[str]:
    """The form of each file of a table."""
    wanted = source.source.format if source.source.format != "auto" else config.data.format
    if table.kind == "parts":
        return ["text"]
    paths = table.files if len(table.columns) == len(table.files) else [source.source.path]
    return [
        detect(names, wanted=wanted, field=source.field, path=path)
        for names, path in zip(table.columns, paths, strict=True)
    ]


def _is_text(table: RawTable, forms: list[str]) -> NDArray[np.bool_]:
    if table.kind == "lines":
        per_file = np.array([form == "text" for form in forms])
        return per_file[np.asarray(table.dataset.with_format("numpy")["file"][:])]
    return np.full(len(table.dataset), forms[0] == "text")


def _num_proc(config: Config, size: int) -> int:
    if config.data.num_proc != "auto":
        return int(config.data.num_proc)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, size // _BYTES_PER_PROCESS))


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


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(str(folder))


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
        fingerprint=_hash(parts),
        fingerprint_parts=parts,
        max_length=selection.max_length,
        max_length_reason=selection.max_length_reason,
        vocab_size=vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad if pad < vocab_size else tokenizer.eos_token_id,
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
            for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        samples.append(
            RenderedSample(pieces=pieces_of_text, tokens=int(ids.size), target_tokens=int(index.targets[piece]))
        )
    return samples


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
