"""The processes below a server: whatever happens to whom, nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

KEEP = [sys.executable, "-m", "foretune.serving.child", "keep"]
# An engine that starts a process of its own and writes down both ids.
ENGINE = "{trap} sleep 300 & echo $$ $! > {ids}; wait"


class Kept:
    """A keeper with an engine below it, in a private folder."""

    def __init__(self, tmp_path: Path, *, trap: str = "", grace: float = 5.0, engine: str = ENGINE) -> None:
        self.folder = tmp_path / "private"
        self.folder.mkdir()
        ids = tmp_path / "ids"
        script = engine.format(ids=ids, trap=trap)
        self.keeper = subprocess.Popen(
            [*KEEP, str(self.folder), str(grace), "bash", "-c", script], stdin=subprocess.PIPE
        )
        wait_for(lambda: ids.is_file() and len(ids.read_text().split()) == 2)
        self.processes = [psutil.Process(int(word)) for word in ids.read_text().split()]

    def close(self) -> None:
        assert self.keeper.stdin is not None
        self.keeper.stdin.close()

    def all_gone(self) -> bool:
        return not any(is_alive(process) for process in self.processes)


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Callable[..., Kept]]:
    made: list[Kept] = []

    def make(**options: object) -> Kept:
        made.append(Kept(tmp_path, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        for process in one.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        one.keeper.kill()
        one.keeper.wait()
        with contextlib.suppress(OSError):
            one.close()


def test_closing_the_pipe_ends_the_engine_and_what_it_started(kept: Callable[..., Kept]) -> None:
    one = kept()
    assert not one.all_gone()
    one.close()
    assert one.keeper.wait(timeout=10) == 0
    assert one.all_gone()
    assert not one.folder.exists()


def test_an_engine_that_does_not_want_to_end_is_killed_after_its_grace(kept: Callable[..., Kept]) -> None:
    one = kept(trap="trap '' TERM;", grace=0.5)
    started = time.monotonic()
    one.close()
    assert one.keeper.wait(timeout=10) == 0
    assert 0.4 < time.monotonic() - started < 5
    assert one.all_gone()


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_the_keeper_outlives_signals_meant_for_the_server(kept: Callable[..., Kept], which: signal.Signals) -> None:
    one = kept()
    one.keeper.send_signal(which)
    time.sleep(0.3)
    assert one.keeper.poll() is None
    one.close()
    assert one.keeper.wait(timeout=10) == 0
    assert one.all_gone()


def test_a_killed_keeper_takes_its_engine_along(kept: Callable[..., Kept]) -> None:
    one = kept()
    one.keeper.kill()
    wait_for(lambda: not is_alive(one.processes[0]))


@pytest.mark.parametrize(("last", "status"), [("exit 7", 7), ("kill -9 $$", 128 + 9)])
def test_an_engine_that_ends_says_how_and_leaves_nobody(kept: Callable[..., Kept], last: str, status: int) -> None:
    one = kept(engine="sleep 300 & echo $$ $! > {ids}; sleep 0.3; " + last)
    assert one.keeper.wait(timeout=10) == status
    wait_for(one.all_gone)
    assert one.folder.exists(), "its log is still to be read"


def test_a_killed_server_leaves_nothing(tmp_path: Path) -> None:
    """The server here is any process that holds the pipe; it started the keeper from a thread that is gone."""
    ids = tmp_path / "ids"
    (tmp_path / "private").mkdir()
    command = [*KEEP, str(tmp_path / "private"), "5", "bash", "-c", ENGINE.format(ids=ids, trap="")]
    program = (
        "import subprocess, threading, time\n"
        f"start = lambda: subprocess.Popen({command!r}, stdin=subprocess.PIPE, start_new_session=True)\n"
        "kept = []\n"
        "thread = threading.Thread(target=lambda: kept.append(start())); thread.start(); thread.join()\n"
        "time.sleep(300)\n"
    )
    server = subprocess.Popen([sys.executable, "-c", program])
    wait_for(lambda: ids.is_file() and len(ids.read_text().split()) == 2)
    below = psutil.Process(server.pid).children(recursive=True)
    assert len(below) == 3
    time.sleep(0.5)  # the starting thread is long gone, and all live on
    assert all(is_alive(process) for process in below)
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    wait_for(lambda: not any(is_alive(process) for process in below))
    assert not (tmp_path / "private").exists()
