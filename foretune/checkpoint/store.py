"""Commit, verify and choose checkpoints. No torch: the supervisor and the export read this side too.

write files into the partial folder ──▶ `commit`: fsync, sha256 of each, manifest last, rename, fsync of the folder
`newest_complete`: the newest whose files all match their hashes; older ones are the fall-back
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from foretune.artifacts import Checkpoint, RankFile, sync_folder
from foretune.checkpoint import layout
from foretune.errors import UserError, VerificationFailed


def prepare_partial(checkpoints: Path, step: int) -> Path:
    """Make an empty partial folder for a step; what a crash left there is removed."""
    folder = layout.partial_folder_of(checkpoints, step)
    shutil.rmtree(folder, ignore_errors=True)
    if not checkpoints.is_dir():
        checkpoints.mkdir(parents=True)
        sync_folder(checkpoints.parent)  # else a power cut could take the folder with all that was renamed into it
    folder.mkdir()
    return folder


def commit(partial: Path, manifest: Checkpoint, *, hashed: Mapping[str, RankFile] | None = None) -> Path:
    """Make a partial folder a complete checkpoint. `manifest.files` is filled in here; returns the final folder.

    Args:
        hashed: files that were synced and hashed while they were written.
    """
    checkpoints = partial.parent
    files = dict(hashed or {})
    files |= hash_files(partial, without=files)
    manifest.model_copy(update={"files": dict(sorted(files.items()))}).write(partial / layout.MANIFEST)
    for folder in [path for path in partial.rglob("*") if path.is_dir()] + [partial]:
        sync_folder(folder)
    final = layout.folder_of(checkpoints, manifest.step)
    if final.exists():  # a step that was trained again after falling back behind it, or a finished run extended
        if _holds(final, files):
            shutil.rmtree(partial)
            return final
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(checkpoints)
    return final


def files_of(folder: Path) -> dict[str, RankFile]:
    """The files that a checkpoint's manifest names, unverified."""
    return Checkpoint.read(folder / layout.MANIFEST).files


def hash_files(folder: Path, *, without: Container[str] = ()) -> dict[str, RankFile]:
    """sha256 and size of every file below a folder except the manifest, each synced to disk first."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != layout.MANIFEST)
    paths = [path for path in paths if str(path.relative_to(folder)) not in without]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        return dict(pool.map(lambda path: (str(path.relative_to(folder)), _hash_file(path)), paths))


def verify(folder: Path) -> Checkpoint:
    """Check every file of a complete checkpoint against its manifest, and return the manifest.

    Raises:
        VerificationFailed: a file is missing, has another size or another hash; the message names it.
    """
    try:
        manifest = Checkpoint.read(folder / layout.MANIFEST)
    except UserError as error:
        raise VerificationFailed(f"{folder.name}: {error.problem}") from error
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise VerificationFailed(f"{folder.name}: {name} is missing")
        if path.stat().st_size != expected.bytes:
            raise VerificationFailed(f"{folder.name}: {name} has {path.stat().st_size} bytes, not {expected.bytes}")
    found = hash_files(folder)
    for name, expected in manifest.files.items():
        if found[name].sha256 != expected.sha256:
            raise VerificationFailed(f"{folder.name}: {name} is damaged (its sha256 is not the manifest's)")
    return manifest


def newest_complete(
    checkpoints: Path, *, on_passed_over: Callable[[str], None] | None = None
) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint that verifies, or None. What is passed over is told to `on_passed_over`."""
    for step in layout.complete_steps(checkpoints):
        folder = layout.folder_of(checkpoints, step)
        try:
            return folder, verify(folder)
        except VerificationFailed as error:
            if on_passed_over:
                on_passed_over(f"passed over: {error}")
    return None


def choose(checkpoints: Path, step: int | None = None) -> tuple[Path, Checkpoint]:
    """The newest checkpoint that verifies, or the one of a step.

    Raises:
        UserError: there is none (of that step).
        VerificationFailed: there are some, and none is sound; or that one is not.
    """
    if step is None:
        passed_over: list[str] = []
        found = newest_complete(checkpoints, on_passed_over=passed_over.append)
        if found is not None:
            return found
        if passed_over:
            raise VerificationFailed(f"no checkpoint in {checkpoints} is sound: {'; '.join(passed_over)}")
        raise UserError("RUN", str(checkpoints.parent), "has no complete checkpoint", "train it first: foretune train")
    steps = layout.complete_steps(checkpoints)
    if step not in steps:
        there = ", ".join(str(number) for number in steps) or "none"
        raise UserError("--step", step, f"there is no checkpoint of that step (there are: {there})", "name one of them")
    folder = layout.folder_of(checkpoints, step)
    return folder, verify(folder)


def _manifests(checkpoints: Path) -> Iterator[Checkpoint]:
    """Those of the complete checkpoints, newest first, unverified; a damaged one is left out."""
    for step in layout.complete_steps(checkpoints):
        with suppress(UserError):
            yield Checkpoint.read(layout.folder_of(checkpoints, step) / layout.MANIFEST)


def newest_manifest(checkpoints: Path) -> Checkpoint | None:
    """That of the newest complete checkpoint, unverified; one that can't be read is passed over."""
    return next(_manifests(checkpoints), None)


def vectors_apart(checkpoints: Path) -> bool | None:
    """`Checkpoint.vectors_apart` of a training, as its newest complete checkpoint has it, unverified; None without."""
    manifest = newest_manifest(checkpoints)
    return None if manifest is None else manifest.vectors_apart


def held_out_rows(checkpoints: Path) -> int | None:
    """Rows that the newest complete checkpoint's held-out loss is of, unverified."""
    found = (manifest.held_out_rows for manifest in _manifests(checkpoints))
    return next((rows for rows in found if rows is not None), None)


def best_step(checkpoints: Path) -> tuple[int, float] | None:
    """Step and held-out loss of the complete checkpoint with the least (the newer of equals), unverified."""
    found = ((manifest.held_out_loss, -manifest.step) for manifest in _manifests(checkpoints))
    losses = [(loss, negative) for loss, negative in found if loss is not None]
    if not losses:
        return None
    loss, negative = min(losses)
    return -negative, loss


def prune(checkpoints: Path, *, keep: int, keep_every: int | None = None, keep_best: bool = False) -> None:
    """Delete what is older than the `keep` newest complete checkpoints, and the partial ones that crashes left.

    Called right after a commit, when nothing is being written: the newest is good, so the last good one always stays.
    `keep_every` keeps every checkpoint whose step is a multiple of it, `keep_best` that with the least held-out loss.
    """
    best = best_step(checkpoints) if keep_best else None
    for step in layout.complete_steps(checkpoints)[keep:]:
        multiple = keep_every is not None and step % keep_every == 0
        if not multiple and (best is None or step != best[0]):
            _delete(layout.folder_of(checkpoints, step))
    for partial in checkpoints.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _holds(folder: Path, files: Mapping[str, RankFile]) -> bool:
    """Whether a complete checkpoint verifies and holds exactly these files."""
    try:
        return verify(folder).files == files
    except VerificationFailed:
        return False


def _delete(folder: Path) -> None:
    """Remove a complete checkpoint; it stops being one first, so that no crash leaves a half of it under its name."""
    doomed = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _hash_file(path: Path) -> RankFile:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return RankFile(sha256=digest.hexdigest(), bytes=size)
