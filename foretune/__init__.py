"""foretune fine-tunes a language model on DeepSpeed from two values, a model and a data file.

    import foretune
    foretune.plan(model="gpt2", data="examples.jsonl")
    foretune.run(model="gpt2", data="examples.jsonl", method="lora")

The face: each verb is a function that returns the artifact it made. Everything is imported on first use (PEP 562), so
that ``import foretune`` costs nothing and brings in no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foretune.errors import ForetuneError, UserError
    from foretune.pipeline import RunResult, chat, evaluate, export, plan, prepare, prove, report, run, serve, train

__all__ = [
    "ForetuneError",
    "RunResult",
    "UserError",
    "chat",
    "evaluate",
    "export",
    "plan",
    "prepare",
    "prove",
    "report",
    "run",
    "serve",
    "train",
]

_HOME = dict.fromkeys(__all__, "foretune.pipeline") | dict.fromkeys(("ForetuneError", "UserError"), "foretune.errors")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'foretune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
