"""For all tests."""

import os
import signal

import pytest

# Commands and ranks are started by the hundred, as an installed package starts them: with what Python compiled once.
# Where the environment forbids to keep that, each would compile some hundred files again (0.3 s of a `plan`'s 1.1).
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell that starts the tests in the background lets them ignore SIGINT, and every process that they start inherits
# that: Python then installs no handler, and the tests of Ctrl-C would wait for nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first: where files run side by side, the others are done while it goes on."""
    items.sort(key=lambda item: item.path.name != "test_proof.py")
