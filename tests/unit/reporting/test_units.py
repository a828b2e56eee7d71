"""Numbers as text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.reporting import units


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (2048, "2 KiB"), (5 * 2**20, "5 MiB"), (int(1.9 * 2**30), "1.9 GiB"),
     (141 * 2**30, "141 GiB"), (2000 * 2**30, "2,000 GiB")],
)  # fmt: skip
def test_bytes(num_bytes: int, text: str) -> None:
    assert units.bytes_text(num_bytes) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (7473, "7,473"), (99_999, "99,999"), (123_456, "123 k"), (1_240_000, "1.24 M"),
     (6_738_415_616, "6.74 B"), (2e12, "2 T")],
)  # fmt: skip
def test_counts(count: float, text: str) -> None:
    assert units.count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.012, "12 ms"), (0.4, "0.4 s"), (3.2, "3.2 s"), (12.3, "12 s"), (59.7, "1m00s"), (190, "3m10s"),
     (3599.9, "1h00m"), (7500, "2h05m"), (273600, "3d04h"), (math.inf, "?"), (math.nan, "?")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert units.duration_text(seconds) == text


def test_losses_and_rates() -> None:
    assert (units.loss_text(2.3104), units.loss_text(0.01234), units.loss_text(math.nan)) == ("2.310", "0.0123", "nan")
    assert (units.learning_rate_text(2e-5), units.learning_rate_text(5e-3), units.learning_rate_text(0)) == (
        "2.0e-05", "0.005", "0")  # fmt: skip
    assert (units.rate_text(1203.4), units.rate_text(8.41)) == ("1,203", "8.41")
    assert (units.plural(1, "row"), units.plural(0, "row"), units.plural(7473, "row")) == (
        "1 row",
        "0 rows",
        "7,473 rows",
    )


@given(st.text())
def test_printable_text_holds_no_control_characters_and_keeps_the_rest(text: str) -> None:
    safe = units.printable(text)
    controls = {chr(code) for code in (*range(32), *range(127, 160))} - {"\n", "\t"}
    assert not controls & set(safe)
    assert units.printable(safe) == safe
    if text.isprintable():
        assert safe == text
