"""A rank that does not move is found, named, and shown where it stands."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from foretune.artifacts import RunFolder
from foretune.heartbeat import Heartbeat, read_heartbeat
from foretune.launch.health import Health

RANK = """
import faulthandler, signal, sys, time
from pathlib import Path
from foretune.artifacts import RunFolder
from foretune.heartbeat import Heartbeat
run, rank, what = RunFolder(Path(sys.argv[1])), int(sys.argv[2]), sys.argv[3]
faulthandler.register(signal.SIGUSR2, file=run.stack_of(rank).open("a"), all_threads=True)
heart = Heartbeat(run.heartbeat_of(rank))
heart.beat("forward", 3)

def all_reduce_in_distributed_c10d():
    time.sleep(60)

def stuck_in_my_own_code():
    time.sleep(60)

if what == "moving":
    while True:
        heart.beat("forward", 3)
        time.sleep(0.02)
if what == "waiting":
    exec(compile("import time\\ndef wait(): time.sleep(60)\\nwait()", "distributed_c10d.py", "exec"))
stuck_in_my_own_code()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.launch.mkdir()
    folder.logs.mkdir()
    return folder


@pytest.fixture
def start(run: RunFolder):
    processes = []

    def begin(rank: int, what: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", RANK, str(run.path), str(rank), what])
        processes.append(process)
        deadline = time.monotonic() + 20
        while (beat := read_heartbeat(run.heartbeat_of(rank))) is None or beat.pid != process.pid:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def found(health: Health, seconds: float = 5.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (hang := health.hang()) is not None:
            return hang
        time.sleep(0.05)
    return None


def test_a_heartbeat_reads_as_it_was_written(tmp_path: Path) -> None:
    assert read_heartbeat(tmp_path / "none") is None
    heart = Heartbeat(tmp_path / "beat")
    assert read_heartbeat(tmp_path / "beat") is None, "no beat yet"
    heart.beat("backward", 41)
    heart.beat("step", 42)
    beat = read_heartbeat(tmp_path / "beat")
    assert beat is not None
    assert (beat.phase, beat.step, beat.beats) == ("step", 42, 2)
    assert abs(beat.time - time.time()) < 5


def test_the_rank_that_does_not_wait_for_others_is_guilty(run: RunFolder, start) -> None:
    start(0, "waiting")
    start(1, "stuck")
    hang = found(Health(run, ranks=2, hang_seconds=0.5))
    assert hang is not None
    assert (hang.rank, hang.step, hang.phase) == (1, 3, "forward")
    assert "stuck_in_my_own_code" in hang.where


def test_a_stopped_rank_is_guilty_and_says_so(run: RunFolder, start) -> None:
    start(0, "waiting")
    victim = start(1, "stuck")
    psutil.Process(victim.pid).suspend()
    hang = found(Health(run, ranks=2, hang_seconds=0.5))
    assert hang is not None
    assert hang.rank == 1
    assert "SIGSTOP" in hang.where


def test_as_long_as_one_moves_nothing_hangs(run: RunFolder, start) -> None:
    start(0, "moving")
    start(1, "stuck")
    assert found(Health(run, ranks=2, hang_seconds=0.3), seconds=1.5) is None


def test_the_bound_adapts_to_the_time_of_a_step(run: RunFolder) -> None:
    health = Health(run, ranks=1, hang_seconds=None)
    for _ in range(5):
        health.took_step(30.0)
    Heartbeat(run.heartbeat_of(0)).beat("forward", 5)
    (beat,) = health.beats().values()
    assert health._limit(beat) == 600.0


def test_the_first_step_of_a_launch_gets_more_time(run: RunFolder) -> None:
    """Busy cores once took 4 s to import on the way to the first step, and that was no hang."""
    health = Health(run, ranks=1, hang_seconds=4.0)
    Heartbeat(run.heartbeat_of(0)).beat("step", 8)
    (beat,) = health.beats().values()
    assert health._limit(beat) == 20.0
    health.took_step(0.1)
    assert health._limit(beat) == 4.0
