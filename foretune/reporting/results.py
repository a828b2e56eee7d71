"""What a whole verb ends with on stdout: several tables, where things are, what comes next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from foretune.artifacts import EvaluationReport, ExportedModel
from foretune.reporting.goodput import Goodput, goodput_view
from foretune.reporting.tables import breakdown_view, evaluation_view, predicted_view
from foretune.reporting.units import printable


def run_view(
    out: Path,
    *,
    checkpoint: Path | None,
    exported: Sequence[ExportedModel],
    evaluation: EvaluationReport | None,
    seconds_by_phase: Mapping[str, float] | None,
    predicted_against_measured: Mapping[str, Mapping[str, float]] | None,
    account: Goodput | None,
    report: Path | None = None,
    width: int,
) -> list[RenderableType]:
    """The end of a run: where the time went, predicted against measured, base against tuned, where everything is.

    What failures cost is shown where there were some.
    """
    parts: list[RenderableType] = []
    if seconds_by_phase:
        parts += ["", "[bold]where the time went[/]", breakdown_view(seconds_by_phase, width=width)]
    if account is not None and account.faults:
        parts += ["", "[bold]what failures cost[/]", *goodput_view(account)]
    if predicted_against_measured:
        parts += ["", "[bold]predicted against measured[/]", predicted_view(predicted_against_measured)]
    if evaluation is not None:
        parts += ["", "[bold]base against tuned[/]", evaluation_view(evaluation, width=width)]
    places: list[tuple[str, object]] = [("run", out), ("checkpoint", checkpoint)]
    places += [("model", folder_of(model, out / "export")) for model in exported]
    places += [("report", report)] if report else []
    places.append(("next", f"foretune serve {out}" if exported else f"foretune export {out}"))
    return [*parts, "", *_named(places)]


def demo_view(
    scores: Iterable[tuple[str, float, float]], *, sentences: int, question: str, answer: str, out: Path
) -> list[RenderableType]:
    """The end of the demo. A score is (name, share of the base model, share of the tuned one)."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(f"{sentences} held-out sentences")
    for name in ("base, 3 examples shown", "tuned"):
        table.add_column(name, justify="right", overflow="fold")
    for what, before, after in scores:
        table.add_row(what, f"{before:.1%}", Text(f"{after:.1%}", style="bold green" if after > before else "bold"))
    places = [("asked over HTTP", question), ("answered", answer), ("run", out), ("next", f"foretune chat {out}")]
    return ["", table, "", *_named(places)]


def folder_of(model: ExportedModel, target: Path) -> Path:
    """Where an exported model stands in the folder that was exported to."""
    return target if model.kind == "full" else target / model.kind


def _named(values: Iterable[tuple[str, object]]) -> list[Text]:
    return [Text.assemble((f"{name}: ", "dim"), printable(str(value))) for name, value in values]
