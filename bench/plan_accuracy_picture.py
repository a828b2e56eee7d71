"""Draws what `plan_accuracy.py` measured: predicted against measured, memory and step time, as one SVG.

    python bench/plan_accuracy_picture.py bench/results/DATE-plan-accuracy.json docs/plan-accuracy.svg

Both axes are logarithmic; a point on the diagonal was predicted exactly. Grey: where the bars of the project end.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

SIDE, LEFT, TOP, GAP = 330, 58, 46, 84
INK, FAINT = "#1f2933", "#e4e7eb"
COLOURS = {"calibration": "#9aa5b1", "judged": "#0b69a3", "fresh": "#d9822b"}
TEXTS = {
    "calibration": "constants were fitted to these",
    "judged": "and judged by these",
    "fresh": "and by these, unseen",
}
#: quantity, title, unit, divisor, decades' ticks, tolerance of the bar.
PANELS: list[tuple[str, str, float, list[float], float]] = [
    ("allocated_bytes", "peak memory, GiB", 2**30, [4, 8, 16, 32, 64], 0.06),
    ("step_seconds", "time of a step, s", 1.0, [0.1, 0.2, 0.5, 1, 2, 5], 0.25),
]


def panel(results: list[dict[str, Any]], number: int) -> list[str]:
    """SVG of one quantity."""
    quantity, title, divisor, ticks, tolerance = PANELS[number]
    x0, y0 = LEFT + number * (SIDE + GAP), TOP
    low, high = math.log(ticks[0] * 0.85), math.log(ticks[-1] * 1.15)

    def at(value: float) -> float:
        return SIDE * (math.log(value) - low) / (high - low)

    def point(measured: float, predicted: float) -> tuple[float, float]:
        return x0 + at(measured), y0 + SIDE - at(predicted)

    ends = [math.exp(low), math.exp(high)]
    band = [point(end, end * (1 + tolerance)) for end in ends] + [
        point(end, end * (1 - tolerance)) for end in reversed(ends)
    ]
    clip = f'clip-path="url(#panel{number})"'
    lines = [
        f'<clipPath id="panel{number}"><rect x="{x0}" y="{y0}" width="{SIDE}" height="{SIDE}"/></clipPath>',
        f'<text x="{x0 + SIDE / 2}" y="{y0 - 18}" text-anchor="middle" font-weight="600">{title}</text>',
        f'<polygon {clip} fill="{FAINT}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in band)}"/>',
    ]
    for tick in ticks:
        x, y = point(tick, tick)
        lines += [
            f'<line x1="{x:.1f}" y1="{y0}" x2="{x:.1f}" y2="{y0 + SIDE}" stroke="{FAINT}"/>',
            f'<line x1="{x0}" y1="{y:.1f}" x2="{x0 + SIDE}" y2="{y:.1f}" stroke="{FAINT}"/>',
            f'<text x="{x:.1f}" y="{y0 + SIDE + 18}" text-anchor="middle">{tick:g}</text>',
            f'<text x="{x0 - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>',
        ]
    (ax, ay), (bx, by) = (point(end, end) for end in ends)
    lines.append(f'<line x1="{ax:.1f}" y1="{ay:.1f}" x2="{bx:.1f}" y2="{by:.1f}" stroke="{INK}"/>')
    lines.append(f'<rect x="{x0}" y="{y0}" width="{SIDE}" height="{SIDE}" fill="none" stroke="{INK}"/>')
    lines.append(f'<text x="{x0 + SIDE / 2}" y="{y0 + SIDE + 38}" text-anchor="middle">measured</text>')
    for result in results:
        if result.get("measured", {}).get(quantity):
            x, y = point(result["measured"][quantity] / divisor, result["predicted"][quantity] / divisor)
            colour = COLOURS[result["half"]]
            lines.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.75" stroke="white">'
                f"<title>{result['name']}</title></circle>"
            )
    return lines


def picture(values: dict[str, Any]) -> str:
    """The whole SVG."""
    width, height = LEFT + 2 * SIDE + GAP + 20, TOP + SIDE + 84
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *panel(values["results"], 0),
        *panel(values["results"], 1),
        f'<text transform="translate(16 {TOP + SIDE / 2}) rotate(-90)" text-anchor="middle">predicted</text>',
    ]
    x, y = LEFT, TOP + SIDE + 66
    present = {result["half"] for result in values["results"] if "measured" in result}
    for half, text in TEXTS.items():
        if half not in present:
            continue
        lines += [
            f'<circle cx="{x + 5}" cy="{y - 4}" r="4" fill="{COLOURS[half]}"/>',
            f'<text x="{x + 16}" y="{y}">{text}</text>',
        ]
        x += 200
    device = values["machine"]["device"]
    lines.append(f'<text x="{width - 20}" y="{y}" text-anchor="end">{device}, {values["date"][:10]}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(picture(json.loads(Path(sys.argv[1]).read_text())))
