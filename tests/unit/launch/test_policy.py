"""Every cause has its answer, and every answer its bound."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.config.schema import RecoverConfig
from foretune.launch.failures import Cause, Failure
from foretune.launch.policy import Policy


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def policy(**keys) -> tuple[Policy, Clock]:
    clock = Clock()
    return Policy(RecoverConfig(**keys), clock=clock), clock


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (Cause.KILLED, "restart"),
        (Cause.CRASHED, "restart"),
        (Cause.HANG, "restart"),
        (Cause.DATA, "restart"),
        (Cause.COMMUNICATION, "restart"),
        (Cause.HOST_OUT_OF_MEMORY, "restart"),
        (Cause.AGENT_LOST, "restart"),
        (Cause.DEVICE_OUT_OF_MEMORY, "replan"),
        (Cause.NON_FINITE, "pass_over"),
        (Cause.LOSS_SPIKE, "pass_over"),
    ],
)
def test_the_answer_to_each_cause(cause: Cause, kind: str) -> None:
    assert policy()[0].decide(Failure(cause, "it happened", step=5)).kind == kind


def test_the_same_crash_at_the_same_step_stops_at_its_second_coming() -> None:
    one, _ = policy()
    assert one.decide(Failure(Cause.CRASHED, "x", step=5)).kind == "restart"
    one.progressed(5)
    action = one.decide(Failure(Cause.CRASHED, "x", step=5))
    assert action.kind == "stop"
    assert "same step" in action.why


def test_what_was_passed_since_was_an_accident() -> None:
    """A soak killed ranks at one step of a window again and again, each time after others had gone past it."""
    one, _ = policy(restarts_per_hour=100)
    for _ in range(10):
        assert one.decide(Failure(Cause.KILLED, "x", step=5)).kind == "restart"
        one.progressed(6)
    assert one.decide(Failure(Cause.CRASHED, "x", step=7)).kind == "restart"
    one.progressed(7)
    assert one.decide(Failure(Cause.CRASHED, "x", step=7)).kind == "stop", "step 7 was reached, not passed"


def test_other_steps_are_other_accidents() -> None:
    one, _ = policy()
    assert {one.decide(Failure(Cause.CRASHED, "x", step=step)).kind for step in range(5)} == {"restart"}


def test_more_restarts_in_an_hour_than_allowed_stop_it_and_hours_forget() -> None:
    one, clock = policy(restarts_per_hour=2)
    kinds = [one.decide(Failure(Cause.KILLED, "x", step=step)).kind for step in range(3)]
    assert kinds == ["restart", "restart", "stop"]
    clock.now = 3601
    assert one.decide(Failure(Cause.KILLED, "x", step=9)).kind == "restart"


def test_waits_double_without_progress_and_start_again_after_it() -> None:
    one, _ = policy(restarts_per_hour=100)
    waits = [one.decide(Failure(Cause.KILLED, "x", step=step)).wait_seconds for step in range(9)]
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    one.progressed(10)
    assert one.decide(Failure(Cause.KILLED, "x", step=99)).wait_seconds == 0


def test_windows_are_passed_over_up_to_their_bound() -> None:
    one, _ = policy(passed_over_windows=2)
    kinds = [one.decide(Failure(Cause.NON_FINITE, "x", step=step)).kind for step in range(3)]
    assert kinds == ["pass_over", "pass_over", "stop"]


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(set(Cause) - {Cause.DEVICE_OUT_OF_MEMORY})), st.integers(0, 3)),
        min_size=40,
        max_size=60,
    )
)
def test_nothing_goes_on_forever_without_time_passing(failures) -> None:
    """Whatever happens, within one hour it stops."""
    one, _ = policy(restarts_per_hour=10)
    assert "stop" in [one.decide(Failure(cause, "x", step=step)).kind for cause, step in failures][:11]
