"""Writes snapshots to disk while training goes on, from memory that outlives the ranks.

    ranks ──copy──▶ memory ──RUN/launch/saving/ready.json──▶ `Persister` ──write, fsync, sha256──▶ commit ──▶ prune
                                    └── removed last: the memory may be used again

A crash of the ranks after `ready.json` loses nothing: `finish` writes the snapshot before they are started again. A
full disk costs that one checkpoint, and training goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from foretune.artifacts import Checkpoint, RankFile, RunFolder
from foretune.checkpoint import layout, store
from foretune.checkpoint.files import WholeWrites
from foretune.config.schema import CheckpointConfig
from foretune.errors import ForetuneError
from foretune.events import EventKind, Journal
from foretune.faults import Faults

_POLL_SECONDS = 0.02
_BLOCK = 1 << 22


class Persister:
    """A thread that waits for snapshots.

    Args:
        memories: descriptors of the ranks' snapshot memory, by local rank.
        retention: which checkpoints are kept.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        memories: list[int],
        retention: CheckpointConfig,
        journal: Journal,
        faults: Faults,
    ) -> None:
        self._run, self._memories, self._retention = run, memories, retention
        self._journal, self._faults = journal, faults
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._watch, name="persister", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish and end the thread."""
        self._ended.set()
        self._thread.join()
        self.finish()

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            try:
                self.finish()
            except Exception as error:
                self.error = error
                return

    def finish(self) -> None:
        """Write what is ready now. Afterwards no snapshot is pending."""
        with self._lock:
            ready = self._run.saving / layout.READY
            if not ready.is_file():
                return
            values = json.loads(ready.read_text())
            try:
                self._persist(values)
            except OSError as error:
                step = values["manifest"]["step"]
                shutil.rmtree(layout.partial_folder_of(self._run.checkpoints, step), ignore_errors=True)
                reason = f"{error.strerror or error}"
                self._tell(f"the checkpoint of step {step} could not be written ({reason}); training goes on")
            except ForetuneError as error:
                self._tell(str(error))
            ready.unlink()

    def _persist(self, values: dict[str, Any]) -> None:
        start = time.perf_counter()
        manifest = Checkpoint.model_validate(values["manifest"])
        snapshots = [json.loads(path.read_text()) for path in sorted(self._run.saving.glob("rank-*.json"))]
        size = sum(length for snapshot in snapshots for _, _, length in snapshot["blobs"])
        checkpoints = self._run.checkpoints
        free = shutil.disk_usage(checkpoints if checkpoints.is_dir() else self._run.path).free
        if free < size * 1.02 + 1e6:
            step = manifest.step
            self._tell(f"the checkpoint of step {step} was not written: it takes {size:,} bytes, {free:,} are free")
            return
        partial = store.prepare_partial(checkpoints, manifest.step)
        if self._faults.is_broken("manifest_last"):  # what a proof must notice
            partial = partial.rename(layout.folder_of(checkpoints, manifest.step))
            manifest.write(partial / layout.MANIFEST)
        hashed: dict[str, RankFile] = {}
        for snapshot in snapshots:
            memory = self._memories[snapshot["local_rank"]]
            for name, offset, length in snapshot["blobs"]:
                hashed[name] = _write(memory, offset, length, partial / name)
                self._faults.fire("commit", manifest.step)
        for path in sorted((self._run.saving / layout.EXTRAS).glob("*")):
            shutil.copy2(path, partial / path.name)
        if self._faults.is_broken("manifest_last"):
            partial = partial.rename(layout.partial_folder_of(checkpoints, manifest.step))
        folder = store.commit(partial, manifest, hashed=hashed)
        self._faults.fire("clean", manifest.step)
        keep = self._retention
        store.prune(checkpoints, keep=keep.keep, keep_every=keep.keep_every, keep_best=keep.keep_best)
        self._journal.write(
            EventKind.CHECKPOINT_SAVED,
            step=manifest.step,
            path=str(folder),
            seconds=round(values["blocked_seconds"] + time.perf_counter() - start, 3),
            blocked_seconds=values["blocked_seconds"],
            bytes=sum(file.bytes for file in store.files_of(folder).values()),
        )

    def _tell(self, message: str) -> None:
        self._journal.write(EventKind.NOTE, message=message)


def _write(memory: int, offset: int, length: int, path: Path) -> RankFile:
    """Copy a piece of memory to a file, synced; hashed on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    end = offset + length
    with WholeWrites(path, "wb") as file:
        while offset < end:
            block = os.pread(memory, min(_BLOCK, end - offset), offset)
            if not block:
                raise OSError("the snapshot is shorter than its index says")
            digest.update(block)
            file.write(block)
            offset += len(block)
        os.fsync(file.fileno())
    return RankFile(sha256=digest.hexdigest(), bytes=length)
