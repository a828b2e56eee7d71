"""What the stages found, as tables for people. In: artifacts and journal figures.  Out: rich renderables, no printing.

All are drawn for a width: from 72 columns on a fact, its value and the reason stand in one row, below that the reason
goes under them. Text that came from data is made harmless before it reaches a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foretune.artifacts import (
    EvaluationReport,
    GenerationSample,
    LossEstimate,
    Plan,
    PreparedDataset,
    SourceSummary,
)
from foretune.reporting.units import bytes_text, count_text, duration_text, loss_text, plural, printable, rate_text

_WIDE = 72
_SAMPLE_CHARACTERS = 400

#: Where the chat template of prepared data came from, as a sentence.
TEMPLATES = {
    "tokenizer": "the tokenizer's own chat template",
    "fallback": "the tokenizer has none; ours is used and saved with the model",
    "file": "the file data.chat_template",
    "none": "plain text, no chat",
}

Fact = tuple[str, str, str]  # what, its value, a remark


def plan_summary(plan: Plan) -> str:
    """The plan in one line: ``ZeRO-2 · 2 ranks · 4 rows x 8 · bf16``."""
    ranks = "1 rank" if plan.world_size == 1 else f"{plan.world_size} ranks"
    parts = [
        f"ZeRO-{plan.zero_stage}",
        ranks,
        f"{plan.micro_batch_size_per_gpu} x {plan.gradient_accumulation_steps} rows",
    ]
    if plan.offload_optimizer or plan.offload_param:
        parts.append("streamed optimizer" if plan.streams_optimizer else "offload")
    if plan.method == "lora":
        parts.append("LoRA")
    return " · ".join([*parts, plan.precision, f"{plan.total_steps} steps"])


def prepared_view(prepared: PreparedDataset, *, samples: int = 3, width: int = 80) -> RenderableType:
    """What preparing kept and dropped, and some documents as the model will see them, targets marked."""
    rows: list[Fact] = [("read", plural(source.rows_read, "row"), _source(source)) for source in prepared.sources]
    kept = prepared.documents + prepared.validation_documents
    rows.append(("kept", plural(kept, "document"), f"{count_text(prepared.validation_documents)} of them held out"))
    rows += [("dropped", plural(count, "row"), reason) for reason, count in prepared.dropped.items() if count]
    if prepared.duplicates and not any("duplicate" in reason for reason in prepared.dropped):
        rows.append(("duplicates", count_text(prepared.duplicates), "dropped: the same tokens as an earlier document"))
    if prepared.truncated_documents:
        cut = f"{count_text(prepared.truncated_tokens)} tokens cut off"
        rows.append(("truncated", plural(prepared.truncated_documents, "document"), cut))
    if prepared.split_documents:
        longer = f"longer than {prepared.max_length:,} tokens"
        rows.append(("split", plural(prepared.split_documents, "document"), longer))
    targets = (
        f"{count_text(prepared.target_tokens)} are targets ({prepared.target_tokens / max(prepared.tokens, 1):.0%})"
    )
    fill = f"of {prepared.max_length:,} tokens, {prepared.fill:.1%} full; {prepared.max_length_reason}"
    rows += [
        ("tokens", count_text(prepared.tokens), targets),
        ("packed", plural(prepared.packs, "row"), fill),
        ("longest", f"{prepared.longest_document:,} tokens", ""),
        ("template", prepared.chat_template, TEMPLATES[prepared.chat_template]),
    ]
    parts: list[RenderableType] = [facts(rows, width)]
    parts += [Text(f"  note: {printable(note)}", style="yellow") for note in prepared.notes]
    if prepared.samples[:samples]:
        parts += [Text(), Text("samples; what is learned stands between ⟦ and ⟧", style="bold")]
    for sample in prepared.samples[:samples]:
        text = Text()
        for piece, is_target in sample.pieces:
            shown = printable(_shorten(piece))
            text.append(f"⟦{shown}⟧" if is_target else shown, style="green" if is_target else "dim")
        parts += [
            indented(text),
            Text(f"  {sample.tokens} tokens, {sample.target_tokens} targets", style="cyan"),
            Text(),
        ]
    return Group(*parts)


def prepared_summary(prepared: PreparedDataset) -> str:
    """The prepared data in one line."""
    parts = [
        plural(prepared.documents, "document"),
        f"{count_text(prepared.tokens)} tokens",
        f"rows {prepared.fill:.1%} full",
    ]
    return " · ".join(parts)


def evaluation_view(report: EvaluationReport, *, samples: int = 3, width: int = 80) -> RenderableType:
    """Base against tuned on the same tokens, with intervals, tasks and answers side by side."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("")
    estimates: list[tuple[str, LossEstimate]] = [("tuned" if report.base else "model", report.tuned)]
    if report.base is not None:
        estimates.insert(0, ("base", report.base))
    for name, _ in estimates:
        table.add_column(name, justify="right", overflow="fold")
    table.add_row("loss (nats/token)", *[loss_text(item.loss) for _, item in estimates])
    table.add_row("95 % interval", *[_interval(item.interval) for _, item in estimates], style="dim")
    table.add_row("perplexity", *[f"{item.perplexity:,.4g}" for _, item in estimates])
    for task, values in report.tasks.items():
        table.add_row(
            task, *[f"{values[name]:.1%}" if name in values else "" for name in ("base", "tuned")[-len(estimates) :]]
        )
    available = report.documents_available or report.documents
    part = f"{count_text(report.documents)} of " if available > report.documents else ""
    size = f"{part}{plural(available, 'document')}, {count_text(report.target_tokens)} target tokens"
    parts: list[RenderableType] = [Text(f"{printable(report.data)}: {size}"), indented(table)]
    if report.difference is not None:
        parts.append(_verdict(report.difference, report.difference_interval))
    for task, values in report.tasks.items():
        if "difference" in values:
            interval = f"{values['difference_low']:+.1%} to {values['difference_high']:+.1%}"
            parts.append(Text(f"  {task}, tuned - base: {values['difference']:+.1%}, 95 % interval {interval}"))
    parts += [Text(f"  {printable(note)}", style="dim") for note in report.notes]
    for sample in report.samples[:samples]:
        parts += [Text(), *_sample(sample)]
    return Group(*parts)


def evaluation_summary(report: EvaluationReport) -> str:
    """The evaluation in one line: ``held-out loss 2.310 → 1.204``."""
    before = "" if report.base is None else f"{loss_text(report.base.loss)} → "
    return f"loss {before}{loss_text(report.tuned.loss)} on {plural(report.documents, 'held-out document')}"


def breakdown_view(seconds: Mapping[str, float], *, width: int = 80) -> RenderableType:
    """Where the wall-clock time went, phase by phase, longest first."""
    total = sum(seconds.values())
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    room = max(min(width - 44, 30), 8)
    for phase, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        share = spent / total if total else 0.0
        bar = Text("█" * round(share * room), style="cyan")
        table.add_row(phase.replace("_", " "), duration_text(spent), f"{100 * share:.1f} %", bar)
    return indented(table)


def predicted_view(quantities: Mapping[str, Mapping[str, float]]) -> RenderableType:
    """What the plan said against what was measured; the ratio is measured / predicted."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("")
    for name in ("predicted", "measured", "ratio"):
        table.add_column(name, justify="right")
    for name, pair in quantities.items():
        predicted, measured = float(pair["predicted"]), float(pair["measured"])
        ratio = f"{measured / predicted:.2f}" if predicted else "-"
        table.add_row(quantity_name(name), quantity_text(name, predicted), quantity_text(name, measured), ratio)
    return indented(table)


_FINDING_MARKS = {"good": ("✓", "green"), "note": ("!", "yellow"), "bad": ("✗", "bold red")}


def findings_view(findings: Iterable[tuple[str, str, str, str, str]], *, width: int = 80) -> RenderableType:
    """What the doctor found. A finding is (level, name, value, meaning, mend); those that need care tell the mend."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=1)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    lines: list[RenderableType] = []
    wide = width >= _WIDE
    if wide:
        table.add_column(ratio=1)
    for level, name, value, meaning, mend in findings:
        mark, style = _FINDING_MARKS[level]
        explained = Text(printable(meaning), style="dim")
        if mend:
            explained.append(f"{'; ' if meaning else ''}mend: {printable(mend)}", style=style)
        head = Text(mark, style=style)
        if wide:
            table.add_row(head, Text(name), Text(printable(value), style="bold"), explained)
            continue
        lines.append(Text.assemble((mark, style), f" {name}  ", (printable(value), "bold")))
        if explained:
            lines.append(indented(explained))
    return table if wide else Group(*lines)


def facts(rows: Iterable[Fact], width: int) -> RenderableType:
    """Rows of (what, value, remark), the remark beside them on a wide screen and below on a narrow one."""
    rows = [(printable(what), printable(value), printable(remark)) for what, value, remark in rows]
    if width >= _WIDE:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(max_width=34, overflow="fold")
        table.add_column(max_width=28, overflow="fold")
        table.add_column(ratio=1)
        for what, value, remark in rows:
            table.add_row(Text(what), Text(value, style="bold"), Text(remark, style="dim"))
        return indented(table)
    names = max((cell_len(what) for what, _, _ in rows), default=0)
    lines: list[RenderableType] = []
    for what, value, remark in rows:
        short = names + cell_len(value) + 4 <= width
        lines.append(Text.assemble(f"{what:<{names}}  " if short else f"{what}  ", (value, "bold")))
        if remark:
            lines.append(indented(Text(remark, style="dim")))
    return indented(Group(*lines))


def indented(body: RenderableType) -> Padding:
    """Two columns to the right."""
    return Padding(body, (0, 0, 0, 2), expand=False)


def _source(source: SourceSummary) -> str:
    weight = f", weight {source.weight:g}" if source.weight != 1 else ""
    return f"{source.path}, as {source.format.replace('_', ' ')}{weight}"


def model_name(folder: str) -> str:
    """The name a person knows a model folder by; a snapshot in the hub's cache gives back its hub id."""
    parts = Path(folder).parts
    cached = next((part for part in parts if part.startswith("models--")), None)
    return cached.removeprefix("models--").replace("--", "/") if cached else (parts[-1] if parts else folder)


def _verdict(difference: float, interval: tuple[float, float] | None) -> Text:
    """The difference of the losses, and whether its interval leaves its sign in no doubt."""
    text = Text(f"  tuned - base: {difference:+.3f} nats/token")
    if interval is None:
        return text
    text.append(f", 95 % interval {_interval(interval)}: ")
    if interval[1] < 0:
        return text.append("better", style="bold green")
    return (
        text.append("worse", style="bold red")
        if interval[0] > 0
        else text.append("no difference shown", style="bold yellow")
    )


def _sample(sample: GenerationSample) -> Sequence[RenderableType]:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    answers = [("base", sample.base, ""), ("tuned", sample.tuned, "bold")] if sample.base is not None else []
    rows = [("prompt", sample.prompt, ""), ("reference", sample.reference, ""), *answers]
    for name, text, style in rows if answers else [*rows, ("model", sample.tuned, "bold")]:
        table.add_row(name, Text(printable(_shorten(text)), style=style))
    return [indented(table)]


def _interval(interval: tuple[float, float]) -> str:
    return (
        f"{loss_text(interval[0])} to {loss_text(interval[1])}"
        if interval[0] >= 0
        else f"{interval[0]:.3f} to {interval[1]:.3f}"
    )


def _shorten(text: str) -> str:
    """Keep both ends of a long text and say what was left out."""
    if len(text) <= _SAMPLE_CHARACTERS:
        return text
    half = _SAMPLE_CHARACTERS // 2
    return f"{text[:half]} […{len(text) - 2 * half} characters…] {text[-half:]}"


_QUANTITIES = {
    "gpu_memory_bytes": "memory of a rank",
    "step_seconds": "step",
    "tokens_per_second": "tokens/s",
    "checkpoint_bytes": "checkpoint",
}


def quantity_name(name: str) -> str:
    """A quantity of `predicted_against_measured` as people call it."""
    return _QUANTITIES.get(name) or name.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")


def quantity_text(name: str, value: float) -> str:
    """Its value, in the unit that the end of its name tells."""
    if name.endswith("_bytes"):
        return bytes_text(value)
    return duration_text(value) if name.endswith("_seconds") else rate_text(value)
