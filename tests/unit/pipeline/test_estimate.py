"""Tokens of raw files, against what preparing them finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from foretune.config import parse_config
from foretune.pipeline.estimate import SAMPLED_ROWS, estimate_data

STORIES = Path(__file__).parents[2] / "models" / "stories260K"


def rows(count: int) -> list[dict[str, str]]:
    return [{"question": f"what is {n} and {n}?", "answer": "It is " + "so " * (n % 40)} for n in range(count)]


def write(path: Path, values: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(json.dumps(value) for value in values))
    return path


def test_a_small_file_is_read_whole(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    data = write(tmp_path / "a.jsonl", rows(100))
    found = estimate_data(parse_config({"model": "m", "data": str(data)}), STORIES)
    assert found is not None
    tokenizer = Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    exact = sum(
        len(tokenizer.encode(f"{row['question']}\n{row['answer']}", add_special_tokens=False).ids) for row in rows(100)
    )
    assert found.documents == 100
    assert found.tokens == pytest.approx(exact, rel=0.02)
    assert "all 100 documents" in found.source
    assert "not counted" in found.source


def test_a_large_file_is_sampled_over_its_length(tmp_path: Path) -> None:
    """The second half has rows five times as long: a sample of the beginning would miss them."""
    values = rows(5000) + [{"question": row["question"] * 5, "answer": row["answer"] * 5} for row in rows(5000)]
    data = write(tmp_path / "a.jsonl", values)
    config = parse_config({"model": "m", "data": str(data)})
    found = estimate_data(config, "nowhere")
    assert found is not None
    assert found.sampled <= SAMPLED_ROWS
    exact = sum(len(f"{row['question']}\n{row['answer']}".encode()) for row in values) / 4
    assert found.tokens == pytest.approx(exact, rel=0.05)
    assert "about" in found.source
    assert "bytes a token" in found.source


def test_parquet_is_sampled_over_its_row_groups(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    values = rows(5000) + [{"question": row["question"] * 5, "answer": row["answer"] * 5} for row in rows(5000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet", row_group_size=500)
    found = estimate_data(parse_config({"model": "m", "data": str(tmp_path / "a.parquet")}), "nowhere")
    assert found is not None
    assert found.documents == 10_000
    assert found.sampled <= SAMPLED_ROWS
    exact = sum(len(f"{row['question']}\n{row['answer']}".encode()) for row in values) / 4
    assert found.tokens == pytest.approx(exact, rel=0.05)


def test_broken_parquet_is_left_to_prepare(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    assert estimate_data(parse_config({"model": "m", "data": str(tmp_path / "a.parquet")}), "nowhere") is None


def test_folders_weights_and_text(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", rows(50))
    (tmp_path / "b.txt").write_text("once upon a time " * 100)
    one = estimate_data(parse_config({"model": "m", "data": str(tmp_path / "a.jsonl")}), STORIES)
    both = estimate_data(
        parse_config(
            {
                "model": "m",
                "data": {
                    "sources": [{"path": str(tmp_path / "a.jsonl"), "weight": 2.0}, {"path": str(tmp_path / "b.txt")}]
                },
            }
        ),
        STORIES,
    )
    assert one is not None
    assert both is not None
    assert both.documents == 2 * one.documents + 1
    assert both.tokens > 2 * one.tokens


@pytest.mark.parametrize("content", ["", "{not json", '{"chosen": "a", "rejected": "b"}\n' * 3])
def test_what_cannot_be_read_is_left_to_prepare(tmp_path: Path, content: str) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text(content)
    assert estimate_data(parse_config({"model": "m", "data": str(data)}), STORIES) is None
    assert estimate_data(parse_config({"model": "m", "data": "nobody/hub-set"}), STORIES) is None


def test_neither_torch_nor_transformers(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", rows(3000))
    code = f"""
import sys
from foretune.pipeline import plan
made = plan({str(STORIES)!r}, {str(data)!r}, hardware="2xcpu")
print(next(d.reason for d in made.decisions if d.field == "data"))
print([name for name in ("torch", "transformers", "deepspeed", "datasets", "peft") if name in sys.modules])
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "estimated from 2,000 of about" in answer.stdout or "estimated from 1," in answer.stdout
    assert answer.stdout.strip().endswith("[]")
