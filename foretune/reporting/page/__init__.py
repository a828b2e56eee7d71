"""The report: one HTML file that tells what a run, or a proof, came to. It loads nothing and runs no script.

RUN/ ──material, history──▶ artifacts that are there, what the journal tells ──charts, ending, render──▶ report.html
"""

from __future__ import annotations

from pathlib import Path

from foretune.artifacts import RunFolder, write_atomically
from foretune.errors import UserError
from foretune.reporting.page.material import read_material, read_proof
from foretune.reporting.page.render import proof_page, run_page

__all__ = ["write_report"]


def write_report(folder: Path, *, out: Path | None = None, in_use: bool = False) -> Path:
    """Write the page of a run folder, or of a folder that `foretune prove` wrote; returns the file.

    Args:
        out: the file; ``report.html`` in that folder if not given.
        in_use: a process is working on the run right now.

    Raises:
        UserError: it is neither, or the file can't be written.
    """
    target = out or RunFolder(folder).report
    if RunFolder.is_run(folder):
        page = run_page(read_material(RunFolder(folder), in_use=in_use))
    elif found := read_proof(folder):
        page = proof_page(folder, found)
    else:
        problem = "is no run folder (it has no config.yaml)" if folder.exists() else "there is no such folder"
        raise UserError("RUN", str(folder), problem, "give the --out of a `foretune run` or a `foretune prove`")
    if target.is_dir():
        raise UserError("--out", str(target), "is a folder", "give a file, for example --out report.html")
    try:
        write_atomically(target, page)
    except OSError as error:
        raise UserError(
            "--out", str(target), f"can't be written ({error.strerror})", "give a file in a folder that is yours"
        ) from None
    return target
