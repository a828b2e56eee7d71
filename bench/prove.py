"""The full matrix of faults, or a soak of random kills, as a result that stays: `make prove`, `make soak`.

    python bench/prove.py                  every cell of the full matrix  ▶ bench/results/DATE-prove.json
    python bench/prove.py --minutes 15     random kills for so long       ▶ bench/results/DATE-soak-prove.json

What `foretune prove` does with its own tiny model, seed 0 unless said otherwise. Cells that failed stand in the result
as they are; ``complete`` is false if it was cut off. Exit code 0 only if all is as expected. The matrix takes 15 to 25
minutes on two cores.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

from measuring import save_result

from foretune.pipeline.proof import prove, soak
from foretune.proving import full_matrix
from foretune.proving.prove import surroundings
from foretune.proving.verdict import CellResult
from foretune.reporting.proof import cell_line

#: Folders of the machine that ran it: tracebacks are told from the package or the library on.
_FOLDERS = re.compile(r'"[^"]*/(site-packages/|lib/(?=python3))|"[^"]*/(?=foretune/|bench/)')
_MODEL = "the proof's own: a llama of 0.1 million parameters, random weights"


def without_folders(cell: CellResult) -> dict[str, Any]:
    """A cell's result that names no folder of this machine."""
    values = cell.model_dump(mode="json")
    return values | {"traceback": _FOLDERS.sub('"', values["traceback"])}


def run_matrix(out: Path, *, seed: int) -> bool:
    """Every cell; what there is of it is written however it ends."""
    cells: list[CellResult] = []
    expected, start = len(full_matrix()), time.perf_counter()

    def add(cell: CellResult) -> None:
        cells.append(cell)
        print(f"{len(cells)}/{expected} {cell_line(cell.model_dump())}", flush=True)

    try:
        prove(out=out, matrix="full", seed=seed, on_cell=add)
    finally:
        passed = all(cell.passed for cell in cells)
        save_result(
            "prove",
            {
                **surroundings(),
                "command": "python bench/prove.py",
                "model": _MODEL,
                "world_size": 2,
                "seed": seed,
                "complete": len(cells) == expected,
                "cells_of_the_matrix": expected,
                "passed": passed,
                "seconds": round(time.perf_counter() - start, 1),
                "cells": [without_folders(cell) for cell in cells],
            },
        )
    return passed


def run_soak(out: Path, *, minutes: float, seed: int) -> bool:
    """Random kills for some minutes."""
    verdict = soak(out=out, minutes=minutes, seed=seed, on_progress=lambda message: print(message, flush=True))
    command = f"python bench/prove.py --minutes {minutes:g} --seed {seed}"
    save_result("soak-prove", {"command": command, "model": _MODEL, **verdict.model_dump(mode="json")})
    return verdict.passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="a soak of so many minutes instead of the matrix")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/proof"), help="where it works; failed cells stay there")
    options = parser.parse_args()
    if options.minutes is None:
        passed = run_matrix(options.out, seed=options.seed)
    else:
        passed = run_soak(options.out, minutes=options.minutes, seed=options.seed)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
