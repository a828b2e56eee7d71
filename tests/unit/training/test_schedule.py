"""The learning rate of a step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.training.schedule import learning_rate


@given(
    total=st.integers(1, 500),
    warmup_share=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_rises_to_the_peak_then_never_rises_again(total: int, warmup_share: float, schedule: str) -> None:
    warmup = math.ceil(total * warmup_share)
    rates = [
        learning_rate(step, peak=1.0, warmup_steps=warmup, total_steps=total, schedule=schedule)
        for step in range(total)
    ]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[0] > 0, "the first step already learns"
    assert max(rates) == pytest.approx(1.0)
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


def test_known_points() -> None:
    def at(step: int, schedule: str) -> float:
        return learning_rate(step, peak=2.0, warmup_steps=10, total_steps=110, schedule=schedule)

    assert at(4, "cosine") == pytest.approx(1.0)
    assert at(60, "cosine") == pytest.approx(1.0)
    assert at(60, "linear") == pytest.approx(1.0)
    assert at(109, "constant") == 2.0
    assert at(110, "cosine") == pytest.approx(0.0)
