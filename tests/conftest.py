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


#: The files that take longest: of those that start whole trainings 350 to 80 s on two cores, of the others 90 to 20 s.
#: Where files run side by side, the shorter ones fill what is left at the end.
LONGEST_FIRST = (
    "test_proof.py", "test_road.py", "test_parity.py", "test_demo.py",
    "test_layers.py", "test_dry_run.py", "test_relayout.py", "test_export.py", "test_spare.py", "test_cli.py",
    "test_weight_sums.py", "test_prepare.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    turns = {name: turn for turn, name in enumerate(LONGEST_FIRST)}
    # There are two files test_road.py, of which one starts no ranks; their tests must not mix.
    items.sort(key=lambda item: (turns.get(item.path.name, len(turns)), item.path))
