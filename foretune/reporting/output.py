"""What goes to stdout: results, and nothing else."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

from rich.console import Console, RenderableType
from rich.text import Text

#: Columns of a pipe or file, where nobody says how many there are.
_PIPE_WIDTH = 100


def show(draw: Callable[[int], Sequence[RenderableType]]) -> None:
    """Print on stdout what `draw` makes for a number of columns. Strings and texts stay one line each."""
    console = Console(highlight=False)
    if console.is_terminal:
        for part in draw(console.width):
            console.print(part, soft_wrap=isinstance(part, str | Text))
        return
    page = Console(file=io.StringIO(), highlight=False, width=_PIPE_WIDTH, no_color=True)
    with page.capture() as captured:
        for part in draw(_PIPE_WIDTH):
            page.print(part, soft_wrap=isinstance(part, str | Text))
    for line in captured.get().splitlines():
        print(line.rstrip())  # rich fills columns with blanks, which are noise in a file


@contextmanager
def results_alone_on_stdout() -> Iterator[None]:
    """Libraries log to stdout (DeepSpeed does on import). Within this, what they write there goes to stderr.

    DeepSpeed's warnings are about its own build ("Setting accelerator to CPU"): nothing a user can act on.
    """
    logging.getLogger("DeepSpeed").addFilter(_errors_only)
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
