"""Ctrl-C and SIGTERM that nobody can lose.

Both raise `KeyboardInterrupt` where the process stands. If a library swallows it there (a bare ``except`` around one of
its lazy imports does), the request is still known and is raised again at the road's next word.
"""

from __future__ import annotations

import signal
import threading

_asked = threading.Event()


def listen() -> None:
    """Let SIGINT and SIGTERM interrupt this process. Does nothing outside the main thread, where Python forbids it."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)


def raise_if_asked() -> None:
    """Raise the `KeyboardInterrupt` of an earlier signal that was swallowed."""
    if _asked.is_set():
        _asked.clear()
        raise KeyboardInterrupt


def _interrupt(_number: int, _frame: object) -> None:
    _asked.set()
    raise KeyboardInterrupt
