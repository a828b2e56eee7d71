"""Which losses are believed."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.errors import MachineFault
from foretune.training.guard import HISTORY, check_loss
from foretune.training.state import TrainState


@dataclass
class Report:
    step: int = 30
    loss: float = 2.0
    grad_norm: float = 1.0
    applied: bool = True


def look(report: Report, before=(), *, spike: float = 25.0, skips_overflow: bool = False) -> TrainState:
    state = TrainState(recent_losses=list(before))
    check_loss(report, state, spike=spike, skips_overflow=skips_overflow)
    return state


STEADY = [2.0 + 0.05 * (-1) ** step for step in range(40)]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_a_fault_of_the_data_that_gave_it(loss: float) -> None:
    with pytest.raises(MachineFault) as fault:
        look(Report(loss=loss))
    assert (fault.value.kind, fault.value.step) == ("non_finite", 29)


def test_so_is_a_gradient_except_where_loss_scaling_expects_it() -> None:
    with pytest.raises(MachineFault):
        look(Report(grad_norm=math.inf))
    with pytest.raises(MachineFault):
        look(Report(applied=False))
    look(Report(grad_norm=math.inf, applied=False), skips_overflow=True)


def test_a_spike_is_found_and_named() -> None:
    with pytest.raises(MachineFault, match="is usual") as fault:
        look(Report(loss=5.0), STEADY)
    assert (fault.value.kind, fault.value.step) == ("loss_spike", 29)


def test_no_spike_without_history_or_when_it_is_off_or_small() -> None:
    look(Report(loss=50.0), STEADY[:5])
    look(Report(loss=50.0), STEADY, spike=0)
    look(Report(loss=2.9), [2.0] * 40)  # 45 % above what never varied: noise, not a spike


@given(st.lists(st.floats(0.5, 4.0), min_size=8, max_size=80), st.floats(0.5, 4.0))
def test_a_loss_within_what_was_seen_is_never_a_spike(before: list[float], share: float) -> None:
    loss = min(max(before), share)
    state = look(Report(loss=loss), before)
    assert state.recent_losses == [*before, loss][-HISTORY:]
