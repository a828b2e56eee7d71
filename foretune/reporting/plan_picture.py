"""A picture of a plan's memory: one stacked bar a strategy, against what a device has. In the terminal, and as SVG.

Plan ──▶ Bar (name, parts, what it is over) ──▶ rich text for any width | an SVG string that needs no other file
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from rich.console import Group, RenderableType
from rich.text import Text

from foretune.artifacts import Plan, Prediction
from foretune.reporting.tables import indented, model_name
from foretune.reporting.units import bytes_text, printable

#: Part → (glyph, terminal colour, colour of the picture). Told apart without colour too; Okabe and Ito's palette.
PARTS: dict[str, tuple[str, str, str]] = {
    "parameters": ("█", "blue", "#0072B2"),
    "optimizer": ("▓", "cyan", "#56B4E9"),
    "gradients": ("▒", "green", "#009E73"),
    "activations": ("░", "yellow", "#E69F00"),
    "loss": ("#", "magenta", "#CC79A7"),
    "step": ("+", "magenta", "#D55E00"),
    "buffers": ("=", "red", "#F0E442"),
    "context": ("·", "bright_black", "#999999"),
    "process": ("·", "bright_black", "#999999"),
    "allocator": ("~", "bright_black", "#666666"),
}
_OTHER = ("?", "white", "#333333")
#: A bar is drawn up to so many times the device's memory, then cut.
_LONGEST = 1.6
_NAME_COLUMNS = 46
_SIDE_BY_SIDE = 96
#: A picture narrower than this, in pixels, has each name above its bar.
_NARROW_PICTURE = 640


@dataclass(frozen=True)
class Bar:
    """One strategy: what it takes of a device by part, and what it takes of the host."""

    name: str
    parts: dict[str, int]
    host_bytes: int
    chosen: bool
    fits: bool
    host_is_short: bool = False

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def amount(self) -> str:
        """``27.7 GiB``, and what the host would need where that is what makes it impossible."""
        over_host = f", host {bytes_text(self.host_bytes)}" if self.host_is_short else ""
        return bytes_text(self.total) + over_host


def bars_of(plan: Plan, *, alternatives: bool = True) -> list[Bar]:
    """The winner's bar, and those of the strategies that lost, in the plan's order."""
    bars = [_bar(f"chosen: {plan.strategy_name}", plan.predicted, plan, chosen=True)]
    for lost in plan.rejected if alternatives else ():
        if lost.prediction is not None:
            bars.append(_bar(lost.name, lost.prediction, plan, chosen=False))
    return bars


def _bar(name: str, prediction: Prediction, plan: Plan, *, chosen: bool) -> Bar:
    order = {part: number for number, part in enumerate(PARTS)}
    parts = dict(sorted(prediction.gpu_memory_parts.items(), key=lambda item: order.get(item[0], len(order))))
    lost = next((item for item in plan.rejected if item.name == name), None)
    reason = "" if lost is None else lost.reason
    name = name.replace("streamed from host memory", "streamed").replace("in host memory", "on the host")
    name = name.replace("optimizer on the host + parameters on the host", "optimizer and parameters on the host")
    host = prediction.host_memory_bytes_per_node
    return Bar(name, parts, host, chosen, "needs" not in reason, host_is_short="of host memory a node" in reason)


def memory_bars(plan: Plan, *, width: int = 80, alternatives: bool = True) -> RenderableType:
    """Stacked bars for a terminal: ``|`` is what the device has."""
    limit = plan.cluster.accelerator.memory_bytes
    bars = bars_of(plan, alternatives=alternatives)
    beside = width >= _SIDE_BY_SIDE
    names = min(_NAME_COLUMNS, max(len(bar.name) for bar in bars)) if beside else 0
    room = max(20, width - names - (2 if beside else 0) - 4 - max(len(bar.amount) for bar in bars))
    scale = min(max(limit, *(bar.total for bar in bars)), _LONGEST * limit) / room
    lines: list[RenderableType] = []
    for bar in bars:
        drawn = _drawn(bar, limit=limit, scale=scale, room=room)
        amount = Text(f" {bar.amount}", style="bold" if bar.fits else "bold red")
        style = "bold" if bar.chosen else ""
        if beside:
            shown = bar.name if len(bar.name) <= names else bar.name[: names - 1] + "…"
            lines.append(Text(f"{printable(shown):<{names}}  ", style=style) + drawn + amount)
        else:
            lines += [Text(printable(bar.name), style=style), drawn + amount]
    seen = {part for bar in bars for part in bar.parts}
    legend = Text()
    for part, (glyph, colour, _) in PARTS.items():
        if part in seen:
            legend.append(f"{glyph} ", style=colour)
            legend.append(f"{part}  ")
    legend.append(f"| {bytes_text(limit)}, all that there is", style="bold")
    return indented(Group(*lines, legend))


def _drawn(bar: Bar, *, limit: int, scale: float, room: int) -> Text:
    """The bar as characters: parts are rounded so that the whole is right; the limit stands where it belongs."""
    cells: list[tuple[str, str]] = []
    reached = 0.0
    for part, size in bar.parts.items():
        glyph, colour, _ = PARTS.get(part, _OTHER)
        reached += size
        cells += [(glyph, colour)] * (round(reached / scale) - len(cells))
    over = len(cells) > room
    cells = cells[:room] if over else cells + [(" ", "")] * (room - len(cells))
    mark = min(room - 1, round(limit / scale))
    cells[mark] = ("|", "bold red" if bar.total > limit else "bold")
    text = Text()
    for glyph, colour in cells:
        text.append(glyph, style=colour)
    return text.append(">" if over else " ")


def plan_svg(plan: Plan, *, width: int = 960) -> str:
    """The same bars as a picture: a whole SVG document, to be saved or to stand in an HTML page.

    Text takes the colour of the page it stands in. Every piece of a bar says what it is when it is pointed at.
    A page may set the colour of what does not fit by the class ``over``.
    """
    limit, bars = plan.cluster.accelerator.memory_bytes, bars_of(plan)
    narrow = width < _NARROW_PICTURE
    left, right, row, top = (8, 8, 48, 66) if narrow else (372, 150, 30, 44)
    legend_columns = 3 if narrow else 5
    room = width - left - right
    scale = room / min(max(limit, *(bar.total for bar in bars)), _LONGEST * limit)
    bottom = top + row * len(bars)
    names = [part for part in PARTS if any(part in bar.parts for bar in bars)]
    legend_rows = -(-len(names) // legend_columns)
    height = bottom + 34 + 20 * legend_rows
    place = f"{plan.world_size} x {plan.cluster.accelerator.name}"
    title = f"Memory of a rank: {printable(model_name(plan.model))} on {printable(place)}"
    pieces = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="13" '
        'fill="currentColor">',
        f"<title>{escape(title)}</title>",
        f'<text x="8" y="20" font-size="15" font-weight="600">{escape(_fitting(title, width // 10))}</text>',
    ]
    for number, bar in enumerate(bars):
        pieces += _svg_bar(bar, left=left, y=top + row * number, scale=scale, room=room, limit=limit, narrow=narrow)
    at = left + limit * scale
    # Where names stand above the bars, the line of the limit goes through the bars alone.
    lines = [(top + row * n - 3, top + row * n + 23) for n in range(len(bars))] if narrow else [(top - 6, bottom)]
    pieces += [
        f'<line x1="{at:.1f}" y1="{start}" x2="{at:.1f}" y2="{end}" stroke="currentColor" stroke-width="1.5" '
        'stroke-dasharray="5 3"/>'
        for start, end in lines
    ]
    anchor = "middle" if at < width - 100 else "end"
    pieces.append(
        f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{bytes_text(limit)}, all that there is</text>'
    )
    for number, part in enumerate(names):
        x = 8 + (number % legend_columns) * (width - 16) // legend_columns
        y = bottom + 40 + 20 * (number // legend_columns)
        pieces.append(f'<rect x="{x}" y="{y - 11}" width="12" height="12" fill="{PARTS[part][2]}"/>')
        pieces.append(f'<text x="{x + 18}" y="{y}">{part}</text>')
    return "\n".join([*pieces, "</svg>"]) + "\n"


def _svg_bar(bar: Bar, *, left: int, y: int, scale: float, room: int, limit: int, narrow: bool) -> list[str]:
    weight = ' font-weight="600"' if bar.chosen else ""
    most = (44 if bar.chosen else 50) - len(bar.amount) if narrow else 46  # characters; bold ones are wider
    name = escape(printable(_fitting(bar.name, most)))
    place = f'x="{left}" y="{y - 6}"' if narrow else f'x="{left - 8}" y="{y + 15}" text-anchor="end"'
    pieces = [f"<text {place}{weight}>{name}</text>"]
    reached = 0
    for part, size in bar.parts.items():
        start, end = min(room, reached * scale), min(room, (reached + size) * scale)
        reached += size
        if end - start < 0.05:
            continue
        colour = PARTS.get(part, _OTHER)[2]
        said = escape(f"{part}: {bytes_text(size)}")
        pieces.append(
            f'<rect x="{left + start:.1f}" y="{y}" width="{end - start:.1f}" height="20" fill="{colour}">'
            f"<title>{said}</title></rect>"
        )
    end = left + min(room, bar.total * scale)
    if bar.total * scale < limit * scale < bar.total * scale + 70:
        end = left + limit * scale  # behind the line of the limit, not across it
    place = f'x="{left + room}" y="{y - 6}" text-anchor="end"' if narrow else f'x="{end + 6:.1f}" y="{y + 15}"'
    colour = "" if bar.fits else ' class="over" fill="#B34700"'
    mark = "" if bar.total * scale <= room else "… "
    return [*pieces, f"<text {place}{weight}{colour}>{mark}{bar.amount}</text>"]


def _fitting(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
