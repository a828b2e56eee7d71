"""Serving: an exported model behind OpenAI's HTTP interface, or in the terminal.

RUN/export ──▶ `serve`: engine (transformers serve or vLLM) behind a thin front     ──▶ http://127.0.0.1:8000/v1
           ──▶ `chat`: in this process, streamed to the terminal

Read on: server.py (the order of things), front.py (what is let through), engines.py (what answers), terminal.py.
Loaded on first use: the processes below a server import this package too, and need none of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foretune.serving.server import running_server, serve
    from foretune.serving.terminal import chat

__all__ = ["chat", "running_server", "serve"]

_WHERE = {"chat": "terminal", "serve": "server", "running_server": "server"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
