"""A Ctrl-C that a library swallows is raised again."""

import contextlib
import os
import signal

import pytest

from foretune.interruption import listen, raise_if_asked


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_swallowed_signal_is_raised_once_more(number: signal.Signals) -> None:
    listen()
    raise_if_asked()
    with contextlib.suppress(KeyboardInterrupt):  # a library's bare except
        os.kill(os.getpid(), number)
    with pytest.raises(KeyboardInterrupt):
        raise_if_asked()
    raise_if_asked()
