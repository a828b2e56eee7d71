"""How many tokens a raw file holds, from a sample of its rows: for a plan that is made before the data is prepared.

files ──at most 2,000 rows, spread over the file──▶ texts ──tokenizers alone──▶ tokens a byte ──▶ `DataEstimate`

Neither torch nor transformers is imported. What the chat template adds is not counted, nor what prepare drops or holds
out, so the figure is labelled as what it is.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from foretune.config import Config
from foretune.data.formats import Conversation, Text, detect, normalise
from foretune.data.readers import STRUCTURED, TEXT, kind_of, parts_of, rows_of, suffix_of
from foretune.errors import UserError
from foretune.planning.mathematics import DataEstimate

#: Rows that are read at most, over all sources.
SAMPLED_ROWS = 2000
#: Characters of plain text that are read at most.
_SAMPLED_CHARACTERS = 1 << 20
#: Without a tokenizer: English in UTF-8 with a vocabulary of 32k to 150k (GSM8K's JSON: 4.2 with SmolLM2's).
BYTES_PER_TOKEN = 4


@dataclass
class _Sample:
    """What was read of one file, and what that says of the whole."""

    lengths: list[int]  # tokens of each sampled document
    documents: float  # of the whole file
    whole: bool  # every row was read


def estimate_data(config: Config, model: Path | str) -> DataEstimate | None:
    """Tokens, documents and lengths of local data; None where there are no files here that can be read.

    Args:
        model: its folder, for tokenizer.json; without one a token is taken to be four bytes.
    """
    tokenizer = _tokenizer(model)
    files = [(file, source) for source in config.data.sources for file in _files(source.path)]
    if not files:
        return None
    share = max(1, SAMPLED_ROWS // len(files))
    tokens = documents = 0.0
    longest, sampled, whole = 0, 0, True
    for file, source in files[:SAMPLED_ROWS]:
        wanted = source.format if source.format != "auto" else config.data.format
        try:
            sample = _sample(file, tokenizer, wanted=wanted, rows=share)
        except (UserError, ValueError, OSError):
            return None  # prepare says what is wrong with it
        if not sample.lengths:
            continue
        mean = sum(sample.lengths) / len(sample.lengths)
        tokens += source.weight * mean * sample.documents
        documents += source.weight * sample.documents
        longest, sampled = max(longest, *sample.lengths), sampled + len(sample.lengths)
        whole = whole and sample.whole
    if not sampled:
        return None
    how = "the model's tokenizer" if tokenizer is not None else f"{BYTES_PER_TOKEN} bytes a token (no tokenizer here)"
    what = f"all {sampled:,} documents" if whole else f"{sampled:,} of about {documents:,.0f} documents"
    source_text = f"estimated from {what} with {how}; the chat template's own tokens are not counted"
    return DataEstimate(max(1, round(tokens)), max(1, round(documents)), longest, sampled, source_text)


def _tokenizer(model: Path | str) -> Any:
    file = Path(model) / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # the library raises bare Exceptions; prepare reports the damage
        return None


def _files(path: str) -> list[Path]:
    """The files that a source names and that are of a kind that is read here."""
    found = [Path(name) for name in glob.glob(path, recursive=True)] if glob.has_magic(path) else [Path(path)]
    inner = [file for one in found for file in (sorted(one.rglob("*")) if one.is_dir() else [one])]
    readable = (*STRUCTURED, *TEXT)
    return [file for file in inner if file.is_file() and suffix_of(file) in readable]


def _sample(file: Path, tokenizer: Any, *, wanted: str, rows: int) -> _Sample:
    if kind_of(file, "data") == "text":
        text = next(parts_of(file, "data"))[0][:_SAMPLED_CHARACTERS]
        length = _counts(tokenizer, [text])[0]
        read = len(text.encode())
        return _Sample([round(length * file.stat().st_size / max(1, read))], 1.0, whole=file.stat().st_size <= read)
    if kind_of(file, "data") == "parquet":
        values, count = _parquet_rows(file, rows)
        texts = _texts_of(values, file, wanted=wanted)
        return _Sample(_counts(tokenizer, texts), count * len(texts) / max(1, len(values)), whole=count <= rows)
    texts, documents, whole = _structured(file, wanted=wanted, rows=rows)
    return _Sample(_counts(tokenizer, texts), documents, whole)


def _parquet_rows(file: Path, rows: int) -> tuple[list[dict[str, Any]], int]:
    """(at most so many rows, from evenly spaced row groups; how many the file has, as its footer says).

    Raises:
        ValueError: the file is not Parquet.
    """
    import pyarrow.parquet  # half a second, so only where there is such a file

    with pyarrow.parquet.ParquetFile(file) as table:
        groups, count = table.num_row_groups, table.metadata.num_rows
        chosen = sorted({groups * number // min(groups, rows) for number in range(min(groups, rows))})
        share = -(-rows // max(1, len(chosen)))
        values: list[dict[str, Any]] = []
        for group in chosen:
            for batch in islice(table.iter_batches(batch_size=share, row_groups=[group]), 1):
                values += batch.to_pylist()
    return values[:rows], count


def _structured(file: Path, *, wanted: str, rows: int) -> tuple[list[str], float, bool]:
    """(texts of the sampled rows, rows of the whole file, whether all were read)."""
    plain_lines = suffix_of(file) in (".jsonl", ".ndjson") and file.suffix != ".gz"
    if plain_lines:
        raw, whole = _spread_lines(file, rows)
    else:
        raw = [text for _, text in islice(rows_of(file, "data"), rows + 1)]
        raw, whole = raw[:rows], len(raw) <= rows
    values = [json.loads(text) for text in raw if text.strip()]
    texts = _texts_of(values, file, wanted=wanted)
    kept = len(texts) / max(1, len(values))
    if whole:
        return texts, float(len(texts)), True
    mean = sum(len(text.encode()) + 1 for text in raw) / len(raw)
    return texts, kept * file.stat().st_size / mean, False


def _texts_of(values: list[Any], file: Path, *, wanted: str) -> list[str]:
    """The text of each row that has one."""
    columns = {key for value in values if isinstance(value, dict) for key in value}
    form = detect(columns, wanted=wanted, field="data", path=str(file))
    return [text for value in values if (text := _text_of(normalise(value, form))) is not None]


def _spread_lines(file: Path, rows: int) -> tuple[list[str], bool]:
    """At most so many lines, from evenly spaced places of the file: its beginning may be unlike the rest."""
    size = file.stat().st_size
    with file.open("rb") as lines:
        first = list(islice(lines, rows + 1))
        if len(first) <= rows:
            return [line.decode("utf-8-sig") for line in first], True
        chosen: dict[int, str] = {}
        for number in range(rows):
            lines.seek(size * number // rows)
            if number:
                lines.readline()  # the rest of a line
            at, line = lines.tell(), lines.readline()
            if line.strip():
                chosen[at] = line.decode("utf-8-sig")
    return list(chosen.values()), False


def _text_of(document: object) -> str | None:
    if isinstance(document, Text):
        return document.text
    if isinstance(document, Conversation):
        return "\n".join(_contents(document))
    return None


def _contents(document: Conversation) -> Iterator[str]:
    for message in document.messages:
        content = message.get("content")
        yield content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _counts(tokenizer: Any, texts: list[str]) -> list[int]:
    if tokenizer is None:
        return [max(1, len(text.encode()) // BYTES_PER_TOKEN) for text in texts]
    return [len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
