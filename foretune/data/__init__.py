"""Data: from files of rows to the batches of each step. `prepare.prepare` leaves a folder, `open_loader` reads it.

Importing this loads neither torch nor transformers; `prepare` does when it runs. What is named here is imported on
first use (PEP 562): a plan samples files (`formats`, `readers`) and needs no numpy, a seventh of the time it takes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foretune.data.chat_template import load_tokenizer
    from foretune.data.loader import Loader, MicroBatch, StepBatch, open_loader

__all__ = ["Loader", "MicroBatch", "StepBatch", "load_tokenizer", "open_loader"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = "chat_template" if name == "load_tokenizer" else "loader"
        return getattr(import_module(f"foretune.data.{home}"), name)
    raise AttributeError(f"module 'foretune.data' has no attribute {name!r}")
