"""Talk goes to stderr, data goes to stdout. One logger for the package, plain by default.

`get_logger(__name__)` anywhere; `configure()` once per process, by the command line or by a rank's main.
"""

from __future__ import annotations

import logging
import sys

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module (pass ``__name__``)."""
    return logging.getLogger(name)


def configure(*, level: int = logging.INFO, prefix: str = "") -> None:
    """Send the package's log lines to stderr; `prefix` marks every line, e.g. with a rank."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(prefix + _FORMAT, datefmt="%H:%M:%S"))
    root = logging.getLogger("foretune")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False
