"""A supervisor as a process of its own: goes on with a run whose plan stands, and says how it ended by its exit code.

    python -m foretune.launch RUN [--faults FILE]

What `foretune train` does after planning, and what the proof kills to see whether anything is left behind.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from foretune.artifacts import Plan, RunFolder
from foretune.config import load_config
from foretune.errors import ForetuneError
from foretune.launch.supervisor import train


def main() -> int:
    """Run it to its end; returns the exit code."""
    parser = argparse.ArgumentParser(prog="foretune.launch")
    parser.add_argument("run", type=Path)
    parser.add_argument("--faults", type=Path)
    options = parser.parse_args()
    run = RunFolder(options.run)
    try:
        train(run, Plan.read(run.plan), load_config(run.config), faults=options.faults)
    except ForetuneError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
