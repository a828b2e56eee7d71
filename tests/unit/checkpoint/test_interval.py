"""How often to save: against the exact cost model, and within its bounds."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from foretune.checkpoint.interval import (
    PRIOR_SECONDS,
    SAVING_SHARE,
    WRITING_SHARE,
    Costs,
    choose_interval,
    daly_seconds,
    mean_time_between_failures,
)

MINUTE = 60.0


@pytest.mark.parametrize(("save", "between_failures"), [(0.05, 86400.0), (5.0, 3600.0), (60.0, 3600.0), (120.0, 600.0)])
def test_it_loses_least_by_the_exact_model(save: float, between_failures: float) -> None:
    """The wall time under exponential failures is proportional to (e^((W + C) / M) - 1) / W (Daly 2006, eq. 20)."""
    work = np.geomspace(save / 50, 50 * between_failures, 400_000)
    with np.errstate(over="ignore"):
        best = work[np.argmin((np.exp((work + save) / between_failures) - 1) / work)]
    assert daly_seconds(save, between_failures) == pytest.approx(best, rel=0.05)


def test_without_failures_it_is_youngs_rule() -> None:
    assert daly_seconds(0.01, 1e7) == pytest.approx(math.sqrt(2 * 0.01 * 1e7), rel=1e-3)


def test_failures_move_the_estimate_off_the_prior() -> None:
    assert mean_time_between_failures(0.0, 0) == PRIOR_SECONDS
    assert mean_time_between_failures(PRIOR_SECONDS, 0) == 2 * PRIOR_SECONDS
    assert mean_time_between_failures(3600.0, 9) == pytest.approx((PRIOR_SECONDS + 3600) / 10)


@example(costs=Costs(step=92.0, blocked=42.0, written=0.0, trained=0.0, failures=0), total=92)  # whole steps
@given(
    costs=st.builds(
        Costs,
        step=st.floats(1e-3, 100),
        blocked=st.floats(0, 1000),
        written=st.floats(0, 1000),
        trained=st.floats(0, 1e6),
        failures=st.integers(0, 1000),
    ),
    total=st.integers(1, 10**6),
)
def test_it_stays_within_its_bounds(costs: Costs, total: int) -> None:
    chosen = choose_interval(costs, total_steps=total, max_lost_seconds=15 * MINUTE)
    seconds, needed = chosen.every * costs.step, max(costs.blocked / SAVING_SHARE, costs.written / WRITING_SHARE)
    assert 1 <= chosen.every <= total
    assert chosen.every in (1, total) or seconds <= max(15 * MINUTE, needed + costs.step)
    assert chosen.every == total or seconds >= needed * (1 - 1e-9)


def test_more_failures_save_more_often_and_the_reason_says_which_bound_holds() -> None:
    def choose(failures: int = 0, minutes: float = 15.0, blocked: float = 0.5, total: int = 10**6) -> tuple[int, str]:
        costs = Costs(step=1.0, blocked=blocked, written=2.0, trained=3600.0, failures=failures)
        chosen = choose_interval(costs, total_steps=total, max_lost_seconds=minutes * MINUTE)
        return chosen.every, chosen.why

    calm, often = choose(), choose(failures=20)
    assert calm[0] > 2 * often[0]
    assert "Daly" in calm[1]
    assert choose(minutes=2.0)[0] == 120
    assert "2 min of work" in choose(minutes=2.0)[1]
    assert choose(blocked=20.0, minutes=2.0)[0] == 400
    assert "saving is to take 5%" in choose(blocked=20.0, minutes=2.0)[1]
    assert choose(total=100) == (10, "a save holds training up for 0.5 s and is written in 2 s; a tenth of the run")
