"""For all tests."""

import signal

import pytest

# A shell that starts the tests in the background lets them ignore SIGINT, and every process that they start inherits
# that: Python then installs no handler, and the tests of Ctrl-C would wait for nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first: where files run side by side, the others are done while it goes on."""
    items.sort(key=lambda item: item.path.name != "test_proof.py")
