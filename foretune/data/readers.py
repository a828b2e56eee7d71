"""One file of text, row by row, in flat memory.

In: a file (gzipped or not).  Out: ``(line number, JSON text)`` per row of a structured file, or parts of a plain text.

    .jsonl ──lines────┐
    .json ──elements──┼──▶ (line, JSON text)        .txt .md ──cut where no token is cut──▶ (part, first, last)
    .csv ──fields─────┘

No more than one row and one buffer are held. A row's JSON is parsed later, in parallel; here only as far as is needed
to find where it ends.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from foretune.errors import UserError

STRUCTURED = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXT = (".txt", ".text", ".md")
#: A plain text is tokenised in parts of about this many characters: memory stays flat, and cores share the work.
PART_CHARACTERS = 1 << 20
_BUFFER_CHARACTERS = 1 << 20
#: Keys under which a JSON object may hold its list of rows.
_WRAPPERS = ("data", "rows", "examples", "instances", "train")


def suffix_of(file: Path) -> str:
    """The suffix that tells the kind: without ``.gz``, in lower case."""
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def kind_of(file: Path, field: str) -> Literal["json", "csv", "text", "parquet"]:
    """What a file holds, by its suffix. Raises `UserError` for a suffix that is not known."""
    suffix = suffix_of(file)
    if suffix == ".parquet" and file.suffix != ".gz":
        return "parquet"
    if suffix in (".csv", ".tsv"):
        return "csv"
    if suffix in (".jsonl", ".ndjson", ".json"):
        return "json"
    if suffix in TEXT:
        return "text"
    raise UserError(
        field,
        str(file),
        f"is of a kind that is not known ({file.suffix or 'no suffix'})",
        f"use a file that ends in {', '.join((*STRUCTURED, *TEXT))}; all but .parquet may be gzipped (.gz)",
    )


def rows_of(file: Path, field: str) -> Iterator[tuple[int, str]]:
    """Yield ``(line number from 1, JSON text)`` of each row of a JSON, JSON-lines or CSV file.

    Raises:
        UserError: the file is not what its suffix says; names file and line.
    """
    with _reading(file, field) as text:
        if kind_of(file, field) == "csv":
            yield from _csv_rows(text, file, field)
        elif suffix_of(file) == ".json":
            yield from _json_rows(text, file, field)
        else:
            yield from _jsonl_rows(text)


def parts_of(file: Path, field: str) -> Iterator[tuple[str, bool, bool]]:
    """Yield ``(part, is first, is last)`` of a plain text; joined they are the file, which may be empty."""
    with _reading(file, field) as text:
        buffer, first = text.read(PART_CHARACTERS + 1), True
        while len(buffer) > PART_CHARACTERS:
            cut = _cut(buffer)
            yield buffer[:cut], first, False
            buffer, first = buffer[cut:] + text.read(PART_CHARACTERS + 1 - (len(buffer) - cut)), False
        yield buffer, first, True


@contextmanager
def _reading(file: Path, field: str) -> Iterator[IO[str]]:
    """A file as text: gunzipped if need be, UTF-8 with or without a byte-order mark, line ends as they are."""
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as raw:
            yield io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
    except UnicodeDecodeError:
        where = _broken_line(file)
        raise UserError(field, f"{file}:{where}", "is not UTF-8 text", "save the file as UTF-8") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(field, str(file), f"is not whole gzip data ({error})", "compress the file again") from None
    except OSError as error:
        raise UserError(
            field, str(file), f"can't be read ({error.strerror})", "check the file and its permissions"
        ) from None


def _broken_line(file: Path) -> int:
    """The line that does not decode: looked for again, as a decoder's buffer does not say."""
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as raw:
        for number, line in enumerate(raw, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _jsonl_rows(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, 1):
        if row := line.strip():
            yield number, row


def _csv_rows(text: IO[str], file: Path, field: str) -> Iterator[tuple[int, str]]:
    csv.field_size_limit(sys.maxsize)  # Python's default refuses fields of more than 128 KiB
    header = text.readline()
    delimiter = "\t" if suffix_of(file) == ".tsv" else ","
    if delimiter == "," and "," not in header and ";" in header:  # how spreadsheets write it where the comma is decimal
        delimiter = ";"
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    line = 2
    try:
        for values in reader:
            if any(value.strip() for value in values):
                if len(values) > len(names):
                    problem = f"has {len(values)} fields, the header names {len(names)}"
                    raise UserError(field, f"{file}:{line}", problem, "quote fields that hold the separator")
                yield line, json.dumps(dict(zip(names, values, strict=False)), ensure_ascii=False)
            line = reader.line_num + 2
    except csv.Error as error:
        raise UserError(field, f"{file}:{line}", f"is not CSV ({error})", "mend the quoting of that row") from None


def _json_rows(text: IO[str], file: Path, field: str) -> Iterator[tuple[int, str]]:
    """A .json file: a list of rows, an object that holds one, JSON lines, or objects one after another."""
    head = text.read(_BUFFER_CHARACTERS)
    wrapped = re.match(r'\s*\{\s*"([^"\\]*)"\s*:\s*\[', head)
    if match := re.match(r"\s*\[", head):
        yield from _elements(text, head, match.end(), file, field)
    elif wrapped and wrapped[1] in _WRAPPERS:
        yield from _elements(text, head, wrapped.end(), file, field)
    elif "\n" in head.strip() and _is_json(head.lstrip().partition("\n")[0]):
        yield from _jsonl_rows(_lines(head, text))
    else:
        for line, row in _elements(text, head, 0, file, field, in_list=False):
            value = json.loads(row)
            lists = [value[key] for key in _WRAPPERS if isinstance(value, dict) and isinstance(value.get(key), list)]
            if lists:
                yield from ((line, json.dumps(item, ensure_ascii=False)) for item in lists[0])
            else:
                yield line, row


def _lines(head: str, text: IO[str]) -> Iterator[str]:
    """Lines of `head`, then those of `text`, which it is the beginning of."""
    *whole, last = head.split("\n")
    yield from whole
    yield last + text.readline()
    yield from text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _elements(
    text: IO[str], buffer: str, position: int, file: Path, field: str, *, in_list: bool = True
) -> Iterator[tuple[int, str]]:
    """Yield each element of a JSON list, or of a sequence of values, as ``(line, text)``.

    Args:
        buffer: the beginning of the file, already read from `text`. position: where the first element may begin in it.
    """
    decode = json.JSONDecoder().raw_decode
    separator = re.compile(r"[\s,]*" if in_list else r"\s*")
    line = 1 + buffer.count("\n", 0, position)
    at_end = False
    while True:
        match = separator.match(buffer, position)
        after = match.end() if match else position
        line += buffer.count("\n", position, after)
        position = end = after
        wrong, problem = line, "the list is not closed"
        if position < len(buffer):
            if in_list and buffer[position] == "]":
                return
            try:
                _, end = decode(buffer, position)
            except RecursionError:
                problem = "it is nested too deeply"
            except json.JSONDecodeError as error:
                wrong, problem = line + buffer.count("\n", position, error.pos), error.msg
        if end > position and (end < len(buffer) or at_end):  # a number at the buffer's end may go on after it
            yield line, buffer[position:end]
            line += buffer.count("\n", position, end)
            position = end
        elif not at_end:  # read as much again as the element has by now: its text is decoded O(log) times, not O(n)
            more = text.read(max(_BUFFER_CHARACTERS, len(buffer) - position))
            at_end = not more
            buffer, position = buffer[position:] + more, 0
        elif not in_list and position == len(buffer):
            return
        else:
            raise UserError(field, f"{file}:{wrong}", f"is not JSON ({problem})", "mend that line")


def _cut(buffer: str) -> int:
    """Where to cut: before a newline between letters, where the rules of GPT-2, Qwen and Llama 3 all end a word."""
    start = len(buffer) - min(len(buffer) // 2, 1 << 16)
    for pattern in (r"(?<=\w)(?=\n\w)", r"(?<=\S)(?=\s)"):
        cuts = [match.start() for match in re.finditer(pattern, buffer[start:])]
        if cuts:
            return start + cuts[-1]
    return PART_CHARACTERS
