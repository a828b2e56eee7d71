"""The plan for people: what was decided and why, what it should take, where the memory goes, what lost against it.

Plan ──▶ rich renderables, drawn for a width         foretune.reporting.plan_picture: the bars, and the same as SVG
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from foretune.artifacts import Derivation, Plan, Prediction
from foretune.reporting.plan_picture import memory_bars
from foretune.reporting.tables import Fact, facts, indented, model_name
from foretune.reporting.units import bytes_text, count_text, duration_text, printable, rate_text

_ALTERNATIVES_SHOWN = 4
#: From here on a line of arithmetic has its formula, its numbers and its bytes in one row.
_WIDE = 100


def plan_view(plan: Plan, *, why: bool = False, width: int = 80) -> RenderableType:
    """The plan: what was decided and the reason of each, what it should take, and what lost against it.

    Args:
        plan: any plan.
        why: also every alternative, the memory of each strategy as bars, and the arithmetic line by line.
        width: columns to draw for.
    """
    parts: list[RenderableType] = [_head(plan)]
    decisions: list[Fact] = [
        (decision.field, value_text(decision.value), decision.reason + (" (pinned)" if decision.pinned else ""))
        for decision in plan.decisions
    ]
    parts += _section("decided", facts(decisions, width))
    parts += _section("predicted, for each rank", facts(_prediction_facts(plan, why=why), width))
    parts += _section("memory of a rank against its limit", memory_bars(plan, width=width, alternatives=why))
    if why and plan.arithmetic:
        parts += _section(
            f"how the peak comes about, in the {plan.predicted.peak_phase}", _arithmetic(plan.arithmetic, width)
        )
    shown = plan.rejected if why else plan.rejected[:_ALTERNATIVES_SHOWN]
    lost: list[Fact] = [(item.name, _figures(item.prediction), item.reason) for item in shown]
    if lost:
        parts += _section("not chosen", facts(lost, width))
    if (hidden := len(plan.rejected) - len(shown)) > 0:
        parts.append(Text(f"  and {hidden} more: --why shows all", style="dim"))
    return Group(*parts)


def dry_run_view(values: Mapping[str, Any], *, width: int = 80) -> RenderableType:
    """What the engine on fake tensors held, against the closed forms: values as of `foretune.dryrun.DryRun.as_json`."""
    verdict = "they agree" if values["agrees"] else "one of them is wrong: please report this"
    rows: list[Fact] = [
        ("by the formulas", bytes_text(values["predicted_bytes"]), "states, sums of gradients, standing buffers"),
        ("in the engine", bytes_text(values["engine_bytes"]), "after its second step, device and host together"),
        ("difference", f"{values['difference']:+.2%}", verdict),
    ]
    rows += [(f"  peak in {phase}", bytes_text(size), "") for phase, size in values["peaks"].items()]
    rows.append(("took", duration_text(values["seconds"]), "peaks are of a CPU's kernels, without their workspaces"))
    return Group(*_section("dry run: DeepSpeed's engine on fake tensors", facts(rows, width)))


def _section(title: str, body: RenderableType) -> list[RenderableType]:
    return [Text(), Text(title, style="bold"), body]


def _head(plan: Plan) -> Text:
    cluster = plan.cluster
    place = f"{plan.world_size} x {cluster.accelerator.name}" + (
        f" on {cluster.nodes} nodes" if cluster.nodes > 1 else ""
    )
    if plan.trainable_parameters == plan.parameters:
        what = f"all {count_text(plan.parameters)} parameters"
    else:
        what = f"{count_text(plan.trainable_parameters)} of {count_text(plan.parameters)} parameters"
    seen = "as probed" if cluster.probed else "as described"
    return Text.assemble((printable(model_name(plan.model)), "bold"), f": trains {what} on {place}, {seen}")


def _prediction_facts(plan: Plan, *, why: bool) -> list[Fact]:
    predicted, cluster = plan.predicted, plan.cluster
    memory = "memory" if cluster.accelerator.kind == "cpu" else "GPU memory"
    phase = f", most in the {predicted.peak_phase}" if predicted.peak_phase else ""
    usable = f"of {bytes_text(cluster.accelerator.memory_bytes)} that may be used{phase}"
    rows = [(memory, bytes_text(predicted.gpu_memory_bytes), usable)]
    if why:
        rows += [(f"  {name}", bytes_text(size), "") for name, size in _largest_first(predicted.gpu_memory_parts)]
    host = f"of {bytes_text(cluster.host_memory_bytes)} on each node"
    rows.append(("host memory", bytes_text(predicted.host_memory_bytes_per_node), host))
    if why:
        rows += [(f"  {name}", bytes_text(size), "") for name, size in _largest_first(predicted.host_memory_parts)]
    rate = f"{rate_text(predicted.tokens_per_second)} tokens/s over all ranks"
    mfu = f", {predicted.mfu:.0%} of the devices' peak (MFU)" if predicted.mfu is not None else ""
    rows.append(("step", duration_text(predicted.step_seconds), rate + mfu))
    if why:
        times = sorted(predicted.step_parts.items(), key=lambda item: -item[1])
        rows += [(f"  {name.replace('_', ' ')}", duration_text(seconds), "") for name, seconds in times]
    rows.append(("whole training", duration_text(predicted.total_seconds), f"{plan.total_steps:,} steps"))
    if predicted.cost is not None:
        rows.append(("cost", f"{predicted.cost:,.2f}", f"at {cluster.price_per_hour:g} a device and hour"))
    if predicted.energy_kwh is not None:
        watts = f"at the board power of {cluster.accelerator.watts:g} W"
        rows.append(("energy", f"{predicted.energy_kwh:,.3g} kWh", watts))
    checkpoint = f"{bytes_text(predicted.checkpoint_bytes)} for each checkpoint"
    rows.append(("disk", bytes_text(predicted.disk_bytes), checkpoint))
    return rows


def _largest_first(parts: dict[str, int]) -> Iterable[tuple[str, int]]:
    return sorted(((name.replace("_", " "), size) for name, size in parts.items() if size), key=lambda item: -item[1])


def _arithmetic(lines: list[Derivation], width: int) -> RenderableType:
    """``formula = numbers = bytes`` by part; on a narrow screen the formula stands alone and the rest below it."""
    drawn: list[RenderableType] = []
    for part, group in groupby(lines, key=lambda line: line.part):
        of_part = list(group)
        total = sum(line.value for line in of_part)
        drawn.append(Text.assemble((part, "bold"), f"  {bytes_text(total)}"))
        for line in of_part:
            source = Text(f"  {line.source}", style="dim") if line.source else Text()
            result = f"{line.value:,} bytes"
            if width >= _WIDE:
                drawn.append(indented(Text(f"{line.formula} = {line.numbers} = {result}") + source))
                continue
            drawn.append(indented(Text(line.formula, style="cyan")))
            drawn.append(indented(Text(f"  = {line.numbers} = {result}")))
            if source:
                drawn.append(indented(Text("  ") + source))
    whole = sum(line.value for line in lines)
    drawn.append(Text.assemble(("together", "bold"), f"  {whole:,} bytes = {bytes_text(whole)}"))
    return indented(Group(*drawn))


def _figures(prediction: Prediction | None) -> str:
    if prediction is None:
        return ""
    return f"{bytes_text(prediction.gpu_memory_bytes)}, {duration_text(prediction.step_seconds)} a step"


def value_text(value: Any) -> str:
    """A decided value: yes, no, or a number that can be read."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 100_000:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
