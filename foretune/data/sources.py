"""Where rows come from: one configured source becomes Arrow tables of raw rows, on disk.

In: a `DataSource` (file, folder, glob, saved data set, hub id) and a scratch folder.  Out: `RawTable`s, memory-mapped.

    path ──what is it?──▶ files ──by suffix──▶ .jsonl .json .csv .tsv ──▶ lines   (JSON text, file and line of a row)
                                               .txt .md               ──▶ parts   (pieces of a long text)
                                               .parquet, saved, hub   ──▶ columns (as they are, through `datasets`)

No row is interpreted here: that is the task of `formats`, done in parallel.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field as item
from pathlib import Path
from typing import Any, Literal

from foretune.config.schema import Config, DataSource
from foretune.data.chat_template import TOKENIZER_FILES
from foretune.data.readers import STRUCTURED, TEXT, kind_of, parts_of, rows_of, suffix_of
from foretune.errors import UserError

#: Raised when the same inputs would give other tokens, packs or files than before.
FORMAT_VERSION = 1
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 4 << 20
#: Rows of each file whose keys tell its form.
_SEEN_ROWS = 100
_SPLIT_NAMES = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}
_SPLIT_IN_NAME = re.compile(rf"(?:^|[-_.])({'|'.join(_SPLIT_NAMES)})(?:[-_.\d]|$)")
Kind = Literal["lines", "parts", "columns"]


@dataclass
class RawTable:
    """Raw rows of one kind. `dataset` is a memory-mapped `datasets.Dataset`.

    Its columns: ``lines``: row (JSON text), file (index into `files`), line (from 1); ``parts``: text, first, last;
    ``columns``: whatever the data set has. `columns` are the names seen in the first rows, per file (for ``columns``:
    one set for all).
    """

    kind: Kind
    dataset: Any
    files: list[str]
    columns: list[set[str]]
    bytes: int


@dataclass
class FoundSource:
    """A configured source, found: its files (for the fingerprint) or the data set it names."""

    source: DataSource
    field: str  # dotted key, for errors
    kind: Literal["files", "saved", "hub"]
    files: list[Path]
    notes: list[str] = item(default_factory=list)


def find_source(source: DataSource, *, position: int) -> FoundSource:
    """Tell what a source's path means and which files it has, in a fixed order.

    Raises:
        UserError: nothing is there, or nothing there can be read.
    """
    name = f"data.sources[{position}].path"
    path = Path(source.path).expanduser()
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        return FoundSource(source, name, "saved", sorted(file for file in path.rglob("*") if file.is_file()))
    if path.is_dir():
        return _find_in_folder(source, name, path)
    if path.is_file():
        kind_of(path, name)
        return FoundSource(source, name, "files", [path])
    if glob.has_magic(source.path):
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not files:
            raise UserError(name, source.path, "matches no file", "check the pattern, and quote it in the shell")
        for file in files:
            kind_of(file, name)
        return FoundSource(source, name, "files", files)
    looks_like_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source.path) is not None
    if not looks_like_hub or suffix_of(path) in (*STRUCTURED, *TEXT):
        raise UserError(
            name, source.path, "there is no such file or folder", f"check the path (read from {Path.cwd()})"
        )
    return FoundSource(source, name, "hub", [])


def read_source(found: FoundSource, scratch: Path) -> list[RawTable]:
    """Bring the rows of a source to Arrow on disk, under `scratch` (a folder of its own).

    Raises:
        UserError: a file is empty, is not what its suffix says (with the line), or a data set can't be loaded.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    if found.kind != "files":
        dataset = _load_dataset(found)
        return [RawTable("columns", dataset, [found.source.path], [set(dataset.column_names)], dataset.data.nbytes)]
    by_kind: dict[str, list[Path]] = {}
    for file in found.files:
        kind = kind_of(file, found.field)
        by_kind.setdefault("lines" if kind in ("json", "csv") else kind, []).append(file)
    readers = {"lines": _read_lines, "text": _read_texts, "parquet": _read_parquet}
    return [readers[kind](found, files, scratch) for kind, files in by_kind.items()]


def _find_in_folder(source: DataSource, name: str, folder: Path) -> FoundSource:
    """A folder's data files: structured ones if it has any, else texts; if named after splits, those of the split."""
    everything = sorted(file for file in folder.rglob("*") if file.is_file() and _is_visible(file.relative_to(folder)))
    structured = [file for file in everything if suffix_of(file) in STRUCTURED]
    files = structured or [file for file in everything if suffix_of(file) in TEXT]
    if not files:
        known = ", ".join((*STRUCTURED, *TEXT))
        mend = f"put files there that end in {known} (or the same with .gz)"
        raise UserError(name, source.path, "is a folder without data files", mend)
    found = FoundSource(source, name, "files", files)
    splits = {file: _split_of(file) for file in files}
    if len({split for split in splits.values() if split}) > 1:
        wanted = _SPLIT_NAMES.get(source.split, source.split)
        found.files = [file for file in files if splits[file] in (wanted, None)]
        if not found.files:
            mend = "set the source's split, or name the files"
            raise UserError(name, source.path, f"has no files of the split {source.split!r}", mend)
    left = [str(file.relative_to(folder)) for file in everything if file not in set(found.files)]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        found.notes.append(f"{source.path}: left aside {', '.join(left[:3])}{more}")
    return found


def _is_visible(path: Path) -> bool:
    return not any(part.startswith((".", "_")) for part in path.parts)


def _split_of(file: Path) -> str | None:
    match = _SPLIT_IN_NAME.search(file.name.removesuffix(".gz").rpartition(".")[0].lower())
    return _SPLIT_NAMES[match[1]] if match else None


def _read_lines(found: FoundSource, files: list[Path], scratch: Path) -> RawTable:
    """JSON, JSON lines and CSV: one row is one JSON text."""
    import pyarrow as pa

    schema = pa.schema([("row", pa.large_string()), ("file", pa.int32()), ("line", pa.int64())])
    target = scratch / "lines.arrow"
    columns: list[set[str]] = []
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for index, file in enumerate(files):
            seen: set[str] = set()
            count = 0
            for lines, rows in _batches(rows_of(file, found.field)):
                if count < _SEEN_ROWS:
                    seen |= _keys(rows[: _SEEN_ROWS - count])
                count += len(rows)
                arrays = [pa.array(rows, pa.large_string()), pa.array([index] * len(rows), pa.int32()), pa.array(lines)]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
            if count == 0:
                mend = "put at least one row there, or leave the file out"
                raise UserError(found.field, str(file), "holds no rows", mend)
            columns.append(seen)
    return RawTable("lines", _map_file(target), [str(file) for file in files], columns, target.stat().st_size)


def _batches(rows: Iterator[tuple[int, str]]) -> Iterator[tuple[list[int], list[str]]]:
    lines: list[int] = []
    texts: list[str] = []
    size = 0
    for line, text in rows:
        lines.append(line)
        texts.append(text)
        size += len(text)
        if len(texts) == _BATCH_ROWS or size > _BATCH_CHARACTERS:
            yield lines, texts
            lines, texts, size = [], [], 0
    if texts:
        yield lines, texts


def _keys(rows: list[str]) -> set[str]:
    """The keys seen in rows that are JSON objects; a bare JSON text counts as a column ``text``."""
    keys: set[str] = set()
    for row in rows:
        try:
            value = json.loads(row)
        except ValueError:  # told with its line where all rows are parsed
            continue
        keys |= set(value) if isinstance(value, dict) else {"text"} if isinstance(value, str) else set()
    return keys


def _read_texts(found: FoundSource, files: list[Path], scratch: Path) -> RawTable:
    """Plain texts: each file is one long document, in parts."""
    import pyarrow as pa

    schema = pa.schema([("text", pa.large_string()), ("first", pa.bool_()), ("last", pa.bool_())])
    target = scratch / "parts.arrow"
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for file in files:
            for part, first, last in parts_of(file, found.field):
                arrays = [pa.array([part], pa.large_string()), pa.array([first]), pa.array([last])]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
    return RawTable("parts", _map_file(target), [str(file) for file in files], [{"text"}], target.stat().st_size)


def _map_file(path: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(path))


def _read_parquet(found: FoundSource, files: list[Path], scratch: Path) -> RawTable:
    from datasets import load_dataset

    names = [str(file) for file in files]
    try:
        dataset = load_dataset("parquet", data_files=names, split="train", cache_dir=str(scratch / "parquet"))
    except Exception as error:  # datasets wraps whatever pyarrow says in errors of its own, of several kinds
        problem = f"is not readable Parquet ({_innermost(error)})"
        mend = "check that the files are whole; files of one source need the same columns"
        raise UserError(found.field, found.source.path, problem, mend) from error
    size = sum(file.stat().st_size for file in files)
    return RawTable("columns", dataset, names, [set(dataset.column_names)], size)


def _load_dataset(found: FoundSource) -> Any:
    """A saved data set, or one from the hub (kept in the hub's own cache)."""
    from datasets import Dataset, load_dataset, load_from_disk

    source = found.source
    try:
        if found.kind == "saved":
            dataset: Any = load_from_disk(str(Path(source.path).expanduser()))
        else:
            dataset = load_dataset(source.path, source.subset, split=source.split)
    except Exception as error:  # network, missing name, missing configuration: one door for all
        problem = f"is no file here, and can't be loaded as a data set ({_innermost(error)})"
        mend = "check the name, subset and split; without a network give a local file or a saved data set"
        raise UserError(found.field, source.path, problem, mend) from error
    if not isinstance(dataset, Dataset):
        if source.split not in dataset:
            mend = f"set the source's split to one of {', '.join(sorted(dataset))}"
            raise UserError(found.field, source.path, f"has no split {source.split!r}", mend)
        dataset = dataset[source.split]
    return dataset


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# ── the fingerprint ─────────────────────────────────────────────────────────────────────────────────────────────────


def fingerprint_parts(
    config: Config, found: list[FoundSource], model_folder: Path, vocab_size: int, context_length: int
) -> dict[str, str]:
    """What the result depends on, part by part, so that a change can be named. Values are hashes."""
    parts = {f"source {i} ({item.source.path})": _hash_source(item) for i, item in enumerate(found)}
    files = {name: _hash_file(model_folder / name) for name in TOKENIZER_FILES if (model_folder / name).is_file()}
    parts["tokenizer"] = hash_of(files)
    parts["model's vocabulary and context"] = hash_of([vocab_size, context_length])
    chat_template = config.data.chat_template
    path = Path(chat_template).expanduser() if chat_template else None
    parts["chat template"] = _hash_file(path) if path is not None and path.is_file() else hash_of(None)
    data = config.data.model_dump(mode="json", include={"format", "train_on_prompt", "system", "deduplicate"})
    options = {
        **{f"data.{key}": value for key, value in data.items()},
        "train.max_length": config.train.max_length,
        "train.seed": config.train.seed,
        "evaluate.validation": config.evaluate.validation,
    }
    parts |= {key: hash_of(value) for key, value in options.items()}
    parts["data format of foretune"] = hash_of(FORMAT_VERSION)
    return parts


def _hash_source(found: FoundSource) -> str:
    """A hash of everything a source's rows depend on: the content of its files, or the identity of its hub data set."""
    source = found.source
    digest = hashlib.sha256(json.dumps(source.model_dump(mode="json"), sort_keys=True).encode())
    for file in found.files:
        digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    if found.kind == "hub":
        digest.update(str(_load_dataset(found)._fingerprint).encode())
    return digest.hexdigest()


def hash_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
