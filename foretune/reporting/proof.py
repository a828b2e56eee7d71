"""How a proof is shown: a line for each cell as it ends, and what they come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from foretune.reporting.units import duration_text

_EXPECTS = {
    "equal": "equal to the bit",
    "equal_to_reference_without_that_window": "equal, without that data",
    "within_tolerance": "within tolerance",
}


def cell_line(result: Mapping[str, Any]) -> str:
    """One cell on one line."""
    mark = "ok  " if result["passed"] else "FAIL"
    lost = "" if result["seconds_lost"] is None else f", back after {duration_text(result['seconds_lost'])}"
    steps = f"{result['steps_lost']} steps again"
    why = f": {result['problem']}" if result["problem"] else f": {_EXPECTS[result['expects']]}"
    return f"{mark} {result['name']}{why} ({steps}{lost})"


def proof_view(
    cells: Sequence[Mapping[str, Any]], *, seconds: float, out: object, left_out: Sequence[str] = ()
) -> list[RenderableType]:
    """Fault by fault: cells, how many passed, steps and seconds lost at most."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("fault", overflow="fold")
    for name in ("passed", "steps lost", "seconds lost"):
        table.add_column(name, justify="right")
    counts = Counter(cell["fault"] for cell in cells)
    for fault, count in counts.items():
        chosen = [cell for cell in cells if cell["fault"] == fault]
        passed = sum(cell["passed"] for cell in chosen)
        lost = [cell["seconds_lost"] for cell in chosen if cell["seconds_lost"] is not None]
        style = "green" if passed == count else "bold red"
        table.add_row(
            fault.replace("_", " "),
            Text(f"{passed}/{count}", style=style),
            str(max(cell["steps_lost"] for cell in chosen)),
            f"{max(lost):.1f}" if lost else "",
        )
    failed = [cell for cell in cells if not cell["passed"]]
    verdict = (
        Text(f"{len(failed)} of {len(cells)} cells failed", style="bold red")
        if failed
        else Text(f"all {len(cells)} cells recovered as expected", style="bold green")
    )
    lines: list[RenderableType] = [table, "", verdict]
    lines += [Text(cell_line(cell), style="red") for cell in failed]
    lines += [Text(f"left out: {text}") for text in left_out]
    return [*lines, Text(f"{duration_text(seconds)}; every cell: {out}")]


def soak_view(values: Mapping[str, Any], *, out: object) -> list[RenderableType]:
    """Random kills: how many, what was wrong, where the time went."""
    wrong = values["wrong"]
    text = f"{values['kills']} kills in {values['runs']} trainings: "
    text += "every one ended in the bits of the reference" if not wrong else f"{wrong} ended in other bits"
    lost = ", ".join(f"{cause} {duration_text(seconds)}" for cause, seconds in values["seconds_lost"].items())
    return [
        Text(text, style="bold red" if wrong else "bold green"),
        Text(f"goodput {values['goodput']:.0%}; lost: {lost}"),
        Text(f"{duration_text(values['seconds'])}; {out}"),
    ]
