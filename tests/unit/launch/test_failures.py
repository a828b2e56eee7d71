"""One cause explains a launch: the first that says more than "my peer is gone"."""

from pathlib import Path

from foretune.artifacts import Outcome
from foretune.launch.agent_process import Exits
from foretune.launch.failures import Cause, classify

LOGS = {rank: Path(f"/logs/rank-{rank}.log") for rank in range(4)}
GONE = Outcome(status="machine_fault", cause="communication failed: connection closed by peer", kind="communication")


def cause_of(outcomes, codes, *, first=None, phases=None, oom_kills=0):
    exits = Exits(codes, frozenset(first if first is not None else codes))
    return classify(outcomes, exits, phases=phases or {}, oom_kills=oom_kills, log_of=LOGS)


def test_a_killed_rank_is_the_cause_and_not_its_complaining_peer() -> None:
    failure = cause_of({0: GONE}, {0: 1, 1: -9}, phases={0: ("backward", 7), 1: ("forward", 7)})
    assert (failure.cause, failure.rank, failure.step, failure.phase) == (Cause.KILLED, 1, 7, "forward")
    assert "SIGKILL" in failure.detail


def test_of_several_silent_ranks_the_one_furthest_behind_is_the_victim() -> None:
    """The agent kills the healthy ones too; they had gone on until they missed it."""
    phases = {0: ("step", 8), 1: ("data", 7), 2: ("step", 8)}
    assert cause_of({}, {0: -9, 1: -9, 2: -9}, phases=phases).rank == 1


def test_what_a_rank_says_of_itself_wins() -> None:
    spilled = Outcome(status="machine_fault", cause="CUDA out of memory", kind="device_out_of_memory", step=3)
    failure = cause_of({0: GONE, 1: spilled}, {0: 1, 1: 1, 2: -9})
    assert (failure.cause, failure.rank, failure.step) == (Cause.DEVICE_OUT_OF_MEMORY, 1, 3)


def test_the_kernels_count_tells_the_oom_killer_from_other_kills() -> None:
    assert cause_of({}, {0: -9, 1: -9}, oom_kills=1).cause == Cause.HOST_OUT_OF_MEMORY
    assert cause_of({}, {0: -9, 1: -9}).cause == Cause.KILLED


def test_an_exception_of_ours_is_a_crash_with_its_story() -> None:
    bug = Outcome(status="bug", cause="ValueError: seven", traceback="…")
    failure = cause_of({1: bug}, {0: -9, 1: 1}, first=[1])  # rank 0 was killed by the agent
    assert (failure.cause, failure.rank) == (Cause.CRASHED, 1)
    assert str(LOGS[1]) in failure.detail


def test_only_complaints_are_a_communication_fault() -> None:
    assert cause_of({0: GONE, 1: GONE}, {0: 1, 1: 1}).cause == Cause.COMMUNICATION


def test_nothing_at_all_is_the_agents_loss() -> None:
    assert cause_of({}, {}).cause == Cause.AGENT_LOST
