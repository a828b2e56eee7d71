"""The run folder: its name, that it is ours alone, and that it never mixes two configurations.

Config ─▶ `resolved` (paths absolute) ─▶ `default_out` (runs/MODEL-DATA-HASH) ─▶ `opened`: check, lock, write
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foretune.artifacts import RunFolder, write_atomically
from foretune.checkpoint import layout
from foretune.config import Config, load_config, to_yaml
from foretune.errors import UserError
from foretune.model.source import default_cache

#: Keys that may change between two calls without changing what is trained, or on what.
_FREE_KEYS = ("checkpoint", "evaluate.tasks", "data.num_proc", "trust_remote_code")
#: Keys that may also change in a run that exists, as long as no checkpoint depends on them.
_PLAN_KEYS = ("plan", "allow_numerics")
_NAME_BYTES = 255  # of one name in a path, on every file system in use
_NAME_CHARACTERS = 30  # two of them in UTF-8, and the hash, stay below the 255 bytes of a file name


def resolved(config: Config) -> Config:
    """The same configuration with local paths made absolute, so that it means the same from any folder.

    Raises:
        UserError: a path that can't be one.
    """
    sources = [
        source.model_copy(update={"path": _absolute(f"data.sources[{index}].path", source.path)})
        for index, source in enumerate(config.data.sources)
    ]
    template = config.data.chat_template
    template = None if template is None else _absolute("data.chat_template", template)
    data = config.data.model_copy(update={"sources": sources, "chat_template": template})
    return config.model_copy(update={"model": _absolute("model", config.model), "data": data})


def calibration_file() -> Path:
    """Where this user's runs on this machine keep what they took against their plans."""
    return default_cache().parent / "calibration.json"


def default_out(config: Config) -> Path:
    """The folder of a run that names none: the same for the same wishes, so that the same command goes on with it.

    ``runs/MODEL-DATA-HASH``; the hash is over every key that changes what is trained or how it is planned.
    """
    config = resolved(config)
    wishes = json.dumps(_flat(config, without=_FREE_KEYS), sort_keys=True)
    digest = hashlib.sha256(wishes.encode()).hexdigest()[:6]
    sources = config.data.sources
    data = _slug(sources[0].path) + (f"+{len(sources) - 1}" if len(sources) > 1 else "")
    return Path("runs") / f"{_slug(config.model)}-{data}-{digest}"


@contextmanager
def opened(run: RunFolder, config: Config) -> Iterator[bool]:
    """Hold a run folder for one process. Yields whether it held a run of exactly this configuration before.

    Raises:
        UserError: (field ``--out``) a file; holds something else, or a training of another configuration; is used by
            another process, or can't be written; also when space or permission runs out within the ``with``.
    """
    with _writable(run.path):
        _refuse_foreign_folder(run.path)
        before = load_config(run.config) if run.config.is_file() else None
        begun = bool(layout.complete_steps(run.checkpoints))
        if before is not None and begun:
            _refuse_other_wishes(run.path, before, config)
        _create(run)
        with _locked(run.path):
            if not begun:
                settle(run, config)
            yield before is not None and _flat(before, without=_FREE_KEYS) == _flat(config, without=_FREE_KEYS)


def settle(run: RunFolder, config: Config) -> None:
    """Write config.yaml: in a new run at once, in one with checkpoints when the plan was found to go on with them."""
    text = to_yaml(config)
    if not run.config.is_file() or run.config.read_text(encoding="utf-8") != text:
        write_atomically(run.config, text)


def expanded(field: str, name: str | os.PathLike[str]) -> Path:
    """A path with its ``~`` replaced, of a length that file systems take. Raises `UserError` where they would crash."""
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise UserError(
            field, str(name), "there is no such user", "write the whole path, or ./~… for that name"
        ) from None
    if any(len(part.encode(errors="surrogatepass")) > _NAME_BYTES for part in path.parts):
        shown = f"{str(name)[:40]}…"
        raise UserError(field, shown, f"has a name of more than {_NAME_BYTES} bytes", "check what was pasted there")
    return path


def _absolute(field: str, name: str) -> str:
    """An absolute path for what is here; a hub id, or a path that is missing, stays as it was written."""
    path = expanded(field, name)
    if path.exists():
        return str(path.resolve())
    if glob.has_magic(name) and not path.is_absolute() and glob.glob(str(path), recursive=True):
        return str(Path.cwd() / path)
    return name


def _slug(name: str) -> str:
    """The part of a path or hub id that people call it by, fit for a folder name."""
    last = name.rstrip("/").rpartition("/")[2]
    last = re.sub(r"\.(gguf|jsonl?|csv|tsv|parquet|txt|gz)\b", "", last, flags=re.IGNORECASE)
    return re.sub(r"[^\w.+-]+", "_", last).strip("_.-")[:_NAME_CHARACTERS] or "data"


def _flat(config: Config, *, without: tuple[str, ...]) -> dict[str, Any]:
    """Dotted key → value, without the named keys and sections."""
    values: dict[str, Any] = {}

    def add(prefix: str, section: Mapping[str, Any]) -> None:
        for name, value in section.items():
            key = prefix + name
            if key in without:
                continue
            if isinstance(value, Mapping):
                add(f"{key}.", value)
            elif isinstance(value, list) and value and isinstance(value[0], Mapping):
                for index, item in enumerate(value):
                    add(f"{key}[{index}].", item)
            else:
                values[key] = value

    add("", config.model_dump(mode="json"))
    return values


def _refuse_foreign_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError("--out", str(out), "is a file", "give a folder, new or of an earlier run")
    if out.is_dir() and not RunFolder.is_run(out) and any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(
            "--out", str(out), "is not empty and holds no run", f"give a new folder, for example --out {out / 'run'}"
        )


def _create(run: RunFolder) -> None:
    try:
        run.create()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(
            "--out",
            str(run.path),
            f"can't be made ({error.strerror})",
            "give an --out in a folder that is yours to write",
        ) from error


def _refuse_other_wishes(out: Path, before: Config, now: Config) -> None:
    """A training goes on with what it began with; two configurations in one folder would mix their results."""
    old, new = (_flat(config, without=_FREE_KEYS + _PLAN_KEYS) for config in (before, now))
    changed = [
        f"{key} was {old.get(key)!r}, is now {new.get(key)!r}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
    if changed:
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            "--out",
            str(out),
            f"holds a run of another configuration: {'; '.join(changed[:3])}{more}",
            "give another --out, or delete that folder to begin anew",
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second process out. The kernel lets go of the lock when this process ends, however it ends."""
    descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _try_twice_to_lock(descriptor)
    except BlockingIOError:
        owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise UserError(
            "--out", str(out), f"is in use by another foretune (process {owner})", "wait for it, or give another --out"
        ) from None
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _try_twice_to_lock(descriptor: int) -> None:
    """A report that asks whether the folder is in use holds its lock for an instant."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.05)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def in_use(out: Path) -> bool:
    """Whether a process holds this run folder now. It is asked by a lock that many may hold, and let go at once."""
    try:
        descriptor = os.open(out / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    """What the file system refuses is the user's to mend."""
    try:
        yield
    except OSError as error:
        # Arrow raises OSError without errno and tells it in its text only.
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise UserError(
                "--out", str(out), "there is no space left on its disk", "free some, or give an --out on another disk"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and _is_below(error.filename, out):
            raise UserError(
                "--out", str(out), f"can't be written ({error.strerror})", "give an --out that is yours to write"
            ) from error
        raise


def _is_below(name: object, out: Path) -> bool:
    """Whether an error's file is the run folder, in it, or a parent of it that had to be made."""
    if not isinstance(name, str | bytes | os.PathLike):
        return False
    path = Path(os.fsdecode(name)).absolute()
    return path == out.absolute() or out.absolute() in path.parents or path in out.absolute().parents
