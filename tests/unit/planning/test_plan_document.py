"""The transcripts in docs/plan.md are what the command prints. Run this file to write them anew."""

from __future__ import annotations

import io
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from foretune.__main__ import main

DOCUMENTS = [Path(__file__).parents[3] / "docs" / name for name in ("plan.md", "plan.zh-CN.md")]
#: A fenced block that begins with a command.
TRANSCRIPT = re.compile(r"(?<=```console\n)\$ foretune (plan [^\n]+)\n(.*?)(?=```)", re.DOTALL)


def printed(command: str) -> str:
    """What the command prints on stdout and stderr, where neither is a terminal."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        main(shlex.split(command))
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()).strip() + "\n"


def transcripts() -> list[tuple[str, str]]:
    return [
        (match[1], match[2]) for document in DOCUMENTS for match in TRANSCRIPT.finditer(document.read_text("utf-8"))
    ]


def test_there_are_the_promised_ones() -> None:
    for document in DOCUMENTS:
        commands = [match[1] for match in TRANSCRIPT.finditer(document.read_text("utf-8"))]
        for wanted in ("gpt2", "RTX4090", "1xH100", "8xH100", "Llama-3-70B", "8x8xH100"):
            assert any(wanted in command for command in commands), wanted


@pytest.mark.parametrize("command", sorted({command for command, _ in transcripts()}))
def test_transcripts_are_true(command: str) -> None:
    for written, text in transcripts():
        if written == command:
            assert text.strip() == printed(command).strip()


if __name__ == "__main__":
    for document in DOCUMENTS:
        text = document.read_text("utf-8")
        document.write_text(TRANSCRIPT.sub(lambda match: f"$ foretune {match[1]}\n{printed(match[1])}", text), "utf-8")
