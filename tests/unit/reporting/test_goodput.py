"""Where the wall time of a training went: every second of its journal is accounted for, under one cause."""

import pytest

from foretune.events import EventKind
from foretune.reporting.goodput import Goodput, goodput, goodput_view


def at(time: float, kind: EventKind, **payload: object) -> dict[str, object]:
    return {"time": time, "kind": str(kind), **payload}


def steps(first: int, last: int, start: float, seconds: float = 1.0) -> list[dict[str, object]]:
    """Steps one after the other, the first from `start` on."""
    numbers = range(first, last + 1)
    return [at(start + seconds * (n - first + 1), EventKind.STEP, step=n, seconds=seconds) for n in numbers]


#: Ten steps; a kill half a second into the fourth falls back to the second, a hang of 5 s follows the sixth.
EVENTS = [
    at(0.0, EventKind.STAGE_STARTED, stage="train"),
    at(0.5, EventKind.LAUNCH, ranks=2),
    at(5.5, EventKind.TRAINING_STARTED, step=0),
    *steps(1, 2, 5.5),
    at(7.8, EventKind.CHECKPOINT_SAVED, step=2, seconds=0.6, blocked_seconds=0.2),
    *steps(3, 3, 7.7),
    at(9.2, EventKind.FAULT, cause="killed"),
    at(9.3, EventKind.RECOVERY, wait_seconds=0),
    at(9.3, EventKind.LAUNCH, ranks=2),
    at(11.2, EventKind.TRAINING_STARTED, step=2),
    *steps(3, 6, 11.2, seconds=1.5),
    at(22.2, EventKind.FAULT, cause="hang"),
    at(22.2, EventKind.LAUNCH, ranks=2),
    at(23.2, EventKind.FAULT, cause="killed"),  # before it trained again
    at(23.2, EventKind.LAUNCH, ranks=2),
    at(25.2, EventKind.TRAINING_STARTED, step=6),
    *steps(7, 8, 25.2),
    at(27.4, EventKind.TRAINING_FINISHED, step=8),
    # an hour later, the same command again
    at(3627.0, EventKind.LAUNCH, ranks=2),
    at(3631.0, EventKind.TRAINING_STARTED, step=8),
    *steps(9, 10, 3631.0),
]


def test_every_second_has_one_cause() -> None:
    account = goodput(EVENTS)
    assert account.faults == 3
    assert account.useful == pytest.approx(2 + 4 * 1.5 + 2 + 2)
    assert account.lost == pytest.approx(
        {
            "starting": 5.0 + 4.0,
            "starting again": 2.0 + 3.0,
            "steps done again": 1.0,
            "steps cut short": 0.5,
            "noticing hangs": 5.0,
            "saving": 0.2,
            "other": 0.2,
        }
    )
    assert account.wall_seconds == pytest.approx((27.4 - 0.5) + (3633.0 - 3627.0)), "the hour between is nobody's"
    assert account.share == pytest.approx(account.useful / account.wall_seconds)


def test_time_between_a_training_that_was_given_up_and_the_next_command_is_nobodys() -> None:
    given_up = [
        at(0.0, EventKind.RUN_STARTED),
        at(0.0, EventKind.LAUNCH, ranks=2),
        at(2.0, EventKind.TRAINING_STARTED, step=0),
        *steps(1, 2, 2.0),
        at(4.5, EventKind.FAULT, cause="killed"),
        at(4.5, EventKind.RECOVERY, action="stop"),
    ]
    again = [
        at(9000.0, EventKind.RUN_STARTED),
        at(9001.0, EventKind.LAUNCH, ranks=2),
        at(9003.0, EventKind.TRAINING_STARTED, step=2),
        *steps(3, 4, 9003.0),
    ]
    account = goodput([*given_up, *again])
    assert account.wall_seconds == pytest.approx(4.5 + 4.0)
    assert (account.lost["starting"], account.lost["starting again"]) == (4.0, 0.0)


def test_accounts_add_up_and_are_shown() -> None:
    account = goodput(EVENTS)
    double = account + account
    assert double.share == pytest.approx(account.share)
    assert double.as_json()["seconds_lost"]["noticing hangs"] == 10.0
    shown = "\n".join(str(line) for line in goodput_view(account))
    assert "goodput 36%: 12 s of 33 s were steps that count; 3 failures" in shown
    assert "lost: starting 9 s, starting again 5 s, noticing hangs 5 s" in shown


def test_of_nothing_nothing_is_lost() -> None:
    assert goodput([]).share == 1.0
    assert Goodput().as_json() == {"goodput": 1.0, "useful_seconds": 0.0, "seconds_lost": {}}
