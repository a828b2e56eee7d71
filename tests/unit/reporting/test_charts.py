"""The charts: whole SVG with any number of points, none of them lost that matters."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from foretune.reporting.page.charts import (
    HEIGHT,
    MOST_POINTS,
    WIDTH,
    Mark,
    Marks,
    axis_text,
    interval_chart,
    step_chart,
    thinned,
    time_chart,
)

NAN, INF = float("nan"), float("inf")


def text_of(value: float) -> str:
    return f"{value:.3g}"


def drawn(svg: str) -> ET.Element:
    """The picture, every coordinate of whose line is inside."""
    root = ET.fromstring(svg)
    for line in [*root.iter("polyline"), *root.iter("polygon")]:
        for pair in line.get("points", "").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT
    return root


@pytest.mark.parametrize("count", [1, 2, 500, 10_000])
def test_any_number_of_points(count: int) -> None:
    points = [(float(n), 3.0 / n + 1) for n in range(1, count + 1)]
    root = drawn(step_chart("Loss", points, to_text=text_of))
    lines = [len(line.get("points", "").split()) for line in root.iter("polyline")]
    assert lines == ([min(count, MOST_POINTS)] if count > 1 else [])
    assert bool(list(root.iter("circle"))) == (count == 1)
    label = root.get("aria-label", "")
    assert f"4 at step 1, {text_of(points[-1][1])} at step {count:,}" in label
    assert len(ET.tostring(root)) < 30_000


def test_no_points_and_no_numbers_say_so() -> None:
    assert "there is no step yet" in step_chart("Loss", [], to_text=text_of)
    assert "none of 2 values is a number" in step_chart("Loss", [(1, NAN), (2, INF)], to_text=text_of)
    assert "there is no step yet" in time_chart([])
    assert interval_chart([], name="x", to_text=text_of) == ""


def test_a_spike_stays_to_be_seen() -> None:
    points = [(float(n), 1.0) for n in range(10_000)]
    points[5_003] = (5_003.0, 40.0)
    assert max(bucket.high for bucket in thinned(points) if bucket) == 40.0
    root = drawn(step_chart("Loss", points, to_text=text_of))
    assert root.find("polygon") is not None
    assert any("(1 to 40)" in (title.text or "") for title in root.iter("title"))


def test_a_gap_where_there_is_no_number() -> None:
    points = [(float(n), NAN if n == 5 else 1.0 + n) for n in range(1, 10)]
    root = drawn(step_chart("Loss", points, to_text=text_of))
    assert len(list(root.iter("polyline"))) == 2
    assert [title.text for title in root.iter("title") if "no number" in (title.text or "")] == [
        "step 5: nan, no number"
    ]
    assert "1 values that are no number" in root.get("aria-label", "")


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [5.0, 5.0], [-1.0, -1.0], [1e-30, 1e30], [0.0, 1e9], [-3.0, 7.0], [1e-9]]
)
def test_any_values_have_an_axis(values: list[float]) -> None:
    root = drawn(step_chart("x", [(float(n), value) for n, value in enumerate(values)], to_text=text_of))
    ticks = [text.text for text in root.iter("text") if text.get("class") == "tick"]
    assert len(ticks) >= 3
    linear = drawn(step_chart("x", [(float(n), value) for n, value in enumerate(values)], to_text=text_of, linear=True))
    assert "logarithmic" not in linear.get("aria-label", "")


def test_wide_spans_are_logarithmic_and_say_so() -> None:
    root = drawn(step_chart("Loss", [(1, 3.0), (2, 0.003)], to_text=text_of))
    assert root.get("aria-label", "").startswith("Loss, logarithmic scale")


def test_faults_and_checkpoints_are_marked() -> None:
    marks = Marks(faults=[Mark(3, "killed <b>")], saves=[Mark(n, f"checkpoint {n}") for n in range(2, 400)])
    root = drawn(step_chart("Loss", [(float(n), 1.0) for n in range(1, 400)], to_text=text_of, marks=marks))
    said = [title.text for title in root.iter("title")]
    assert "killed <b>" in said
    assert "checkpoint 399" in said
    assert sum("checkpoint" in (text or "") for text in said) <= 60


def test_time_shows_what_was_done_again() -> None:
    svg = time_chart(
        [[(1.0, 0.0), (5.0, 6.0)], [(7.0, 4.0), (13.0, 10.0)]],
        faults=[(5.5, 6, "killed")],
        saves=[(4.0, 4, "checkpoint of step 4")],
    )
    root = drawn(svg)
    assert len(list(root.iter("polyline"))) == 2
    assert "10 steps in 13 s, in 2 launches" in root.get("aria-label", "")
    assert {"killed", "checkpoint of step 4"} <= {title.text for title in root.iter("title")}


def test_intervals_stand_on_one_axis() -> None:
    rows = [("base", 2.0, (1.5, 2.5)), ("tuned", 1.0, (0.9, 1.1))]
    root = ET.fromstring(interval_chart(rows, name="loss", to_text=text_of))
    whole = [line for line in root.iter("line") if line.get("class") == "whisker" and line.get("y1") == line.get("y2")]
    (base_low, base_high), (tuned_low, tuned_high) = [(float(w.get("x1", 0)), float(w.get("x2", 0))) for w in whole]
    assert tuned_low < tuned_high < base_low < base_high
    assert math.isclose((base_high - base_low) / (tuned_high - tuned_low), 5, rel_tol=0.02)


def test_short_numbers() -> None:
    numbers = (0, 0.02, 2.5, 300, 2000, 20_000, 3e6, 4e9, 1e-5, 1e20)
    assert [axis_text(number) for number in numbers] == [
        "0", "0.02", "2.5", "300", "2000", "20k", "3M", "4B", "1e-05", "1e+20",
    ]  # fmt: skip
