"""Sources: what a path means, and files of every kind to rows, with the line of what is broken."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretune.config.schema import DataSource
from foretune.data import readers
from foretune.data.readers import parts_of, rows_of
from foretune.data.sources import find_source, read_source
from foretune.errors import UserError

ROWS = [{"question": f"What is {i}?", "answer": f"It is\n{i}, “so”."} for i in range(5)]


def read(path: Path | str, scratch: Path, **options: Any) -> list[dict[str, Any]]:
    """All rows that a source gives, as mappings."""
    rows: list[dict[str, Any]] = []
    for table in read_source(find_source(DataSource(path=str(path), **options), position=0), scratch):
        got = table.dataset.to_list()
        rows += [json.loads(row["row"]) for row in got] if table.kind == "lines" else got
    return rows


def refused(path: Path | str, scratch: Path, **options: Any) -> UserError:
    with pytest.raises(UserError) as error:
        read(path, scratch, **options)
    assert error.value.field == "data.sources[0].path"
    assert error.value.mend
    return error.value


def as_json_lines(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


def as_csv(rows: list[dict[str, str]], separator: str = ",") -> str:
    import csv
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


FILES = {
    "a.jsonl": as_json_lines(ROWS),
    "blank.jsonl": "\n" + as_json_lines(ROWS).replace("\n", "\n\n"),
    "bom.jsonl": "\ufeff" + as_json_lines(ROWS),
    "windows.jsonl": as_json_lines(ROWS).replace("\n", "\r\n"),
    "lines.json": as_json_lines(ROWS),
    "list.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "wrapped.json": json.dumps({"data": ROWS}, indent=1),
    "wrapped_later.json": json.dumps({"version": "1.0", "data": ROWS}),
    "one_after_another.json": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "a.csv": as_csv(ROWS),
    "semicolons.csv": as_csv(ROWS, ";"),
    "a.tsv": as_csv(ROWS, "\t"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_files_of_every_kind_give_the_same_rows(tmp_path: Path, name: str, zipped: bool) -> None:
    data = FILES[name].encode()
    file = tmp_path / (name + ".gz" if zipped else name)
    file.write_bytes(gzip.compress(data) if zipped else data)
    expected = [{**row, "answer": row["answer"]} for row in ROWS]
    assert read(file, tmp_path / "scratch") == expected


def test_parquet_and_saved_data_sets(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    assert read(tmp_path / "a.parquet", tmp_path / "1") == ROWS
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved", tmp_path / "2") == ROWS
    splits = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])})
    splits.save_to_disk(str(tmp_path / "splits"))
    assert read(tmp_path / "splits", tmp_path / "3") == ROWS
    assert read(tmp_path / "splits", tmp_path / "4", split="test") == ROWS[:1]
    assert "train" in refused(tmp_path / "splits", tmp_path / "5", split="dev").mend


def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    assert "not readable Parquet" in refused(tmp_path / "a.parquet", tmp_path / "scratch").problem


def test_rows_of_different_shapes_stay_as_they_are(tmp_path: Path) -> None:
    rows = [{"messages": [{"a": 1}]}, {"messages": "x", "tools": {"b": [1, "two"]}}, {"messages": None}]
    (tmp_path / "a.jsonl").write_text(as_json_lines(rows))
    assert read(tmp_path / "a.jsonl", tmp_path / "scratch") == rows


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.json", '[\n{"a": 1},\n{"a": }\n]', "a.json:3"),
        ("cut.json", '[\n{"a": 1},\n{"a": "b', "cut.json:3"),
        ("open.json", '[{"a": 1}\n', "open.json:2"),
        ("a.csv", 'a,b\n1,2\n"x\ny",2,3\n', "a.csv:3"),
        ("quotes.csv", 'a,b\n1,2\n"x"y,2\n', "quotes.csv:3"),
    ],
)
def test_what_is_broken_is_named_with_its_line(tmp_path: Path, name: str, text: str, where: str) -> None:
    (tmp_path / name).write_text(text)
    assert str(refused(tmp_path / name, tmp_path / "scratch").value).endswith(where)


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff\xfe"}\n')
    error = refused(tmp_path / "a.jsonl", tmp_path / "scratch")
    assert str(error.value).endswith("a.jsonl:2")
    assert "UTF-8" in error.mend
    (tmp_path / "a.txt").write_bytes(b"fine\n" + b"caf\xe9")
    assert str(refused(tmp_path / "a.txt", tmp_path / "scratch").value).endswith("a.txt:2")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
def test_broken_gzip_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"plain")
    assert "gzip" in refused(tmp_path / name, tmp_path / "1").problem
    (tmp_path / name).write_bytes(gzip.compress(as_json_lines(ROWS * 99).encode())[:200])
    assert "gzip" in refused(tmp_path / name, tmp_path / "2").problem


@pytest.mark.parametrize("text", ["", "\n \n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_files_without_rows_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert "holds no rows" in refused(tmp_path / name, tmp_path / "scratch").problem


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    assert "no such file" in refused("missing.jsonl", tmp_path / "s").problem
    assert "no such file" in refused(str(tmp_path / "gone"), tmp_path / "s").problem
    assert "matches no file" in refused(str(tmp_path / "*.jsonl"), tmp_path / "s").problem
    (tmp_path / "empty").mkdir()
    assert "without data files" in refused(tmp_path / "empty", tmp_path / "s").problem
    (tmp_path / "a.docx").write_bytes(b"x")
    assert "not known (.docx)" in refused(tmp_path / "a.docx", tmp_path / "s").problem


def test_a_data_set_that_can_t_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    error = refused("nobody/no-such-data-set-0", tmp_path / "s")
    assert "can't be loaded as a data set" in error.problem
    assert "without a network" in error.mend


def test_a_hub_data_set_is_asked_for_by_name_subset_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(path: str, name: str | None, *, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("openai/gsm8k", tmp_path / "s", subset="main", split="test") == ROWS
    assert asked == [("openai/gsm8k", "main", "test")]


def test_globs_and_folders_read_their_files_in_order(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        (tmp_path / f"part{i}.jsonl").write_text(as_json_lines([ROWS[i]]))
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden.jsonl").write_text(as_json_lines(ROWS))
    assert read(tmp_path / "part*.jsonl", tmp_path.parent / "s1") == ROWS[:3]
    assert read(tmp_path, tmp_path.parent / "s2") == ROWS[:3]
    found = find_source(DataSource(path=str(tmp_path)), position=0)
    assert found.notes == [f"{tmp_path}: left aside README.md"]


def test_a_folder_with_splits_gives_one_of_them(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "gsm_validation"):
        (tmp_path / f"{name}.jsonl").write_text(as_json_lines([{"text": name}]))
    train = [row["text"] for row in read(tmp_path, tmp_path.parent / "s1")]
    assert train == ["train-00000-of-00002", "train-00001-of-00002"]
    assert [row["text"] for row in read(tmp_path, tmp_path.parent / "s2", split="dev")] == ["gsm_validation"]


@given(
    values=st.lists(
        st.one_of(
            st.integers(),
            st.text(max_size=8),
            st.dictionaries(st.text(max_size=3), st.lists(st.text(max_size=5) | st.booleans(), max_size=3), max_size=3),
        ),
        max_size=12,
    ),
    indent=st.sampled_from([None, 0, 2]),
    size=st.integers(1, 12),
)
@settings(max_examples=200, deadline=None)
def test_json_lists_come_back_whatever_the_buffer(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, size: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "values.json"
    text = json.dumps(values, indent=indent)
    file.write_text(text)
    before, readers._BUFFER_CHARACTERS = readers._BUFFER_CHARACTERS, size
    try:
        got = list(rows_of(file, "data"))
    finally:
        readers._BUFFER_CHARACTERS = before
    assert [json.loads(row) for _, row in got] == values
    lines = text.split("\n")
    assert all(lines[line - 1].strip().startswith(row.split("\n")[0][:1]) for line, row in got if indent is not None)


@given(text=st.text(alphabet="ab \n.é", max_size=400), size=st.integers(4, 60))
@settings(max_examples=200, deadline=None)
def test_parts_of_a_text_join_to_the_text(tmp_path_factory: pytest.TempPathFactory, text: str, size: int) -> None:
    file = tmp_path_factory.getbasetemp() / "text.txt"
    file.write_text(text, encoding="utf-8", newline="")
    before, readers.PART_CHARACTERS = readers.PART_CHARACTERS, size
    try:
        parts = list(parts_of(file, "data"))
    finally:
        readers.PART_CHARACTERS = before
    assert "".join(part for part, _, _ in parts) == text
    assert [first for _, first, _ in parts] == [True] + [False] * (len(parts) - 1)
    assert [last for _, _, last in parts] == [False] * (len(parts) - 1) + [True]
    assert all(0 < len(part) <= size for part, _, _ in parts) or not text


def test_reading_a_large_json_list_takes_no_more_memory(tmp_path: Path) -> None:
    file = tmp_path / "large.json"
    with file.open("w") as out:  # 120 MB in one list
        out.write("[" + ",\n".join([json.dumps({"text": "word " * 2400})] * 10_000) + "]")
    script = (
        "import resource, sys; from pathlib import Path; from foretune.data.readers import rows_of;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "count = sum(1 for _ in rows_of(Path(sys.argv[1]), 'data'));"
        "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True)
    count, grown = map(int, done.stdout.split())
    assert count == 10_000
    assert grown < 40_000  # KiB on Linux
