"""When the next checkpoint is due: as pinned, as planned, and then as measured."""

from pathlib import Path

from foretune.events import EventKind, Journal, read_events
from foretune.training.pace import SavePace


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def drive(pace: SavePace, journal: Journal, clock: Clock, *, last: int, blocked: float, written: float) -> list[int]:
    """Steps of one second, each journalled; a save is, one step after it was taken. Returns the saved steps."""
    saved: list[int] = []
    for step in range(1, last + 1):
        clock.now += 1.0
        journal.write(EventKind.STEP, step=step, seconds=1.0)
        if saved and saved[-1] == step - 1:
            journal.write(EventKind.CHECKPOINT_SAVED, step=step - 1, blocked_seconds=blocked, seconds=blocked + written)
        if pace.due(step):
            saved.append(step)
            pace.saved(step)
    return saved


def open_pace(path: Path, clock: Clock, *, step: int = 0, pinned: bool = False, **options) -> tuple[SavePace, Journal]:
    journal = Journal(path / "events.jsonl")
    values = {"every": 100, "total_steps": 10_000, "max_lost_seconds": 900.0, **options}
    return SavePace(journal, step=step, pinned=pinned, clock=clock, **values), journal


def notes(path: Path) -> list[str]:
    return [event["message"] for event in read_events(path / "events.jsonl") if event["kind"] == EventKind.NOTE]


def test_what_the_user_pinned_is_kept(tmp_path: Path) -> None:
    clock = Clock()
    pace, journal = open_pace(tmp_path, clock, pinned=True, every=10)
    assert drive(pace, journal, clock, last=35, blocked=9.0, written=9.0) == [10, 20, 30]
    assert notes(tmp_path) == []


def test_it_adapts_once_a_save_was_measured_and_says_so(tmp_path: Path) -> None:
    clock = Clock()
    pace, journal = open_pace(tmp_path, clock)
    saved = drive(pace, journal, clock, last=399, blocked=0.02, written=0.48)
    assert saved[0] == 100, "the plan's number comes first"
    assert saved[1] - saved[0] == saved[2] - saved[1] == 58, "√(2 · 0.02 · 86400) is 58.8 s"
    (note,) = notes(tmp_path)
    assert note.startswith("saving every 58 steps: a save holds training up for 0.02 s and is written in 0.48 s")


def test_a_launch_knows_what_the_run_went_through(tmp_path: Path) -> None:
    clock = Clock()
    _, journal = open_pace(tmp_path, clock)
    for step in range(1, 11):
        journal.write(EventKind.STEP, step=step, seconds=1.0)
    journal.write(EventKind.CHECKPOINT_SAVED, step=10, blocked_seconds=0.02, seconds=0.5)
    for _ in range(99):
        journal.write(EventKind.FAULT, cause="killed")
    pace, journal = open_pace(tmp_path, clock, step=10)
    due = [step for step in range(11, 40) if pace.due(step)]
    assert due[0] == 15, "100 failures in the prior's day: √(2 · 0.02 · 864) is 5.9 s"


def test_work_that_grows_slow_is_saved_in_time(tmp_path: Path) -> None:
    clock = Clock()
    pace, journal = open_pace(tmp_path, clock, max_lost_seconds=50.0, every=40)
    assert drive(pace, journal, clock, last=41, blocked=0.02, written=0.48) == [40]
    clock.now += 55.0  # one slow step
    assert pace.due(42)
