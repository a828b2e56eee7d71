"""The picture of a plan's memory: in a terminal of any width, and as SVG."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from foretune.artifacts import Plan
from foretune.config import parse_config
from foretune.planning import make_plan, parse_hardware
from foretune.reporting.plan_picture import PARTS, bars_of, memory_bars, plan_svg
from foretune.reporting.plan_view import dry_run_view, plan_view

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def plan() -> Plan:
    """7B on one card: some strategies are over the card, some over the host, one is cut and one fits."""
    config = parse_config({"model": "m", "data": "d"})
    return make_plan(config, model_folder="Qwen2.5-7B", cluster=parse_hardware("1xH100-80GB,ram=125GB"), prepared=None)


def drawn(renderable: object, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, no_color=True)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_bars_keep_to_the_width_and_have_the_limit(plan: Plan, width: int) -> None:
    text = drawn(memory_bars(plan, width=width), width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for bar in bars_of(plan):
        assert bar.amount.split(",")[0] in text
    bars = [line for line in text.splitlines() if "█" in line and "GiB" in line and "parameters" not in line]
    assert len(bars) >= 4
    marks = {line.index("|") for line in bars}
    assert len(marks) == 1  # the limit stands in one place
    assert "host 1" in " ".join(text.split())


def test_one_bar_alone_is_the_winners(plan: Plan) -> None:
    text = drawn(memory_bars(plan, width=100, alternatives=False), 100)
    assert text.count("GiB") == 2  # the bar's and the limit's
    assert re.search(r"chosen: ZeRO-1 \+ \d+% of the optimizer streamed", text)


def test_the_svg_is_whole_and_true_to_scale(plan: Plan) -> None:
    root = ET.fromstring(plan_svg(plan))
    assert root.tag == f"{SVG}svg"
    line = root.find(f"{SVG}line")
    assert line is not None
    limit_at = float(line.get("x1", "0"))
    pieces = [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    left = min(float(rect.get("x", "0")) for rect in pieces)
    winner = [rect for rect in pieces if rect.get("y") == pieces[0].get("y")]
    end = max(float(rect.get("x", "0")) + float(rect.get("width", "0")) for rect in winner)
    share = plan.predicted.gpu_memory_bytes / plan.cluster.accelerator.memory_bytes
    assert (end - left) / (limit_at - left) == pytest.approx(share, abs=0.01)
    assert all(float(rect.get("x", "0")) + float(rect.get("width", "0")) <= 960 for rect in root.iter(f"{SVG}rect"))
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert any("71" in text or "GiB" in text for text in texts)
    assert {name for name in PARTS if name in texts} >= {"parameters", "optimizer", "gradients"}


def test_a_narrow_svg_has_names_above_the_bars_and_nothing_outside(plan: Plan) -> None:
    root = ET.fromstring(plan_svg(plan, width=400))
    for rect in root.iter(f"{SVG}rect"):
        assert float(rect.get("x", "0")) + float(rect.get("width", "0")) <= 400
    rows: dict[str, list[str]] = {}
    for text in root.iter(f"{SVG}text"):
        rows.setdefault(text.get("y", ""), []).append(text.text or "")
    bars = [texts for texts in rows.values() if len(texts) == 2 and "GiB" in texts[1]]
    assert len(bars) == len(bars_of(plan))
    assert all(len(name) + len(amount) <= 50 for name, amount in bars)


def test_names_that_could_break_xml_do_not(plan: Plan) -> None:
    odd = plan.model_copy(update={"model": '/m/<b>&"x"'})
    ET.fromstring(plan_svg(odd))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_why_has_every_line_of_the_arithmetic(plan: Plan, width: int) -> None:
    text = drawn(plan_view(plan, why=True, width=width), width)
    flat = " ".join(text.split())
    for line in plan.arithmetic:
        assert f"{line.value:,}" in flat
    assert f"{plan.predicted.gpu_memory_bytes:,} bytes" in flat


@pytest.mark.parametrize("agrees", [True, False])
def test_the_dry_run_says_whether_they_agree(agrees: bool) -> None:
    values = {"predicted_bytes": 2**30, "engine_bytes": 2**30, "difference": 0.0, "agrees": agrees, "seconds": 20.0,
              "peaks": {"step": 2**31}}  # fmt: skip
    text = drawn(dry_run_view(values, width=80), 80)
    assert ("they agree" in text) == agrees
    assert "2.0 GiB" in text
