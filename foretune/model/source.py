"""What the user calls a model becomes a local Hugging Face folder.

    folder with config.json ───────────────────────────────▶ itself
    file.gguf ──sha256──▶ cache/<sha256>/ (converted once) ─▶ RUN/model/ (hard links)
    hub id ──huggingface_hub──▶ its snapshot in the hub's cache

No torch here, except inside the conversion of a .gguf file.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from pathlib import Path

from foretune.artifacts import RunFolder, sync_folder
from foretune.errors import UserError
from foretune.model.gguf import ConvertedModel, convert_gguf, read_manifest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
#: Seconds that the hub may take to answer a question about files. (Downloads themselves may take their time.)
HUB_TIMEOUT_SECONDS = 10.0
_DESCRIPTION_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_SAFE_WEIGHTS = ["*.safetensors"]
_PICKLED_WEIGHTS = ["pytorch_model*.bin"]


def default_cache() -> Path:
    """Where converted and fetched models are kept for all runs of this user."""
    return Path.home() / ".cache" / "foretune" / "models"


def resolve_model(
    name: str,
    *,
    run_model_folder: Path,
    trust_remote_code: bool = False,
    weights: bool = True,
    cache: Path | None = None,
) -> Path:
    """Find, fetch or convert a model.

    Pickled ``pytorch_model*.bin`` weights are accepted where there are no safetensors: transformers reads them with
    ``weights_only=True``, which runs no code.

    Args:
        name: folder, .gguf file or hub id.
        run_model_folder: where the run keeps a model that had to be converted (``RunFolder.model``).
        trust_remote_code: also fetch the Python files that come with a hub model.
        weights: whether weights are needed (not for training from random ones).
        cache: where conversions are kept; `default_cache` if not given.

    Returns:
        A folder with config.json, tokenizer and, if `weights`, weights.

    Raises:
        UserError: with field ``model``, for whatever the user can mend.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError("model", name, "is a file, but no .gguf file", _mend_file(path))
        return _converted(path.resolve(), run_model_folder, cache or default_cache())
    if path.is_dir():
        return _check_folder(path, name, weights=weights)
    if _looks_like_path(name) or not HUB_ID.fullmatch(name):
        raise UserError(
            "model",
            name,
            "there is no such folder or file",
            _near(path) or "check the path, or give a hub id such as org/name",
        )
    return _from_hub(name, trust_remote_code=trust_remote_code, weights=weights)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights that transformers loads, every shard of them."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return True
        if (folder / index).is_file():
            return not _missing_shards(folder / index)
    return False


def _missing_shards(index: Path) -> list[str]:
    """Files that an index of shards names and that are not there."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        return [f"(all: {index.name} is damaged)"]
    return [name for name in names if not (index.parent / name).is_file()]


def _check_weights(folder: Path, name: str) -> None:
    """Say what is wrong with a local folder's weights before anything slow starts."""
    for index in folder.glob("*.index.json"):
        missing = _missing_shards(index)
        if missing:
            raise UserError(
                "model",
                name,
                f"lacks {len(missing)} of its weight files, the first is {missing[0]}",
                "fetch them, or copy the whole folder again",
            )
    if not has_weights(folder):
        raise UserError(
            "model",
            name,
            "holds a config.json but no weights (model.safetensors)",
            "give a folder with weights, or --from-scratch to start from random ones",
        )
    for file in folder.glob("*.safetensors"):
        if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            raise UserError(
                "model", name, f"{file.name} is a Git LFS pointer, not weights", "run `git lfs pull` in that folder"
            )


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~")) or name.endswith(("/", ".gguf", ".safetensors", ".bin")) or name.count("/") > 1
    )


def _check_folder(folder: Path, name: str, *, weights: bool) -> Path:
    """The folder itself, or a `UserError` that says what it is instead of a model."""
    if (folder / "config.json").is_file():
        if weights:
            _check_weights(folder, name)
        return folder.resolve()
    if RunFolder.is_run(folder):
        raise UserError("model", name, "is a run, not a model", f"give what it exported: {folder / 'export'}")
    if (folder / "adapter_config.json").is_file():
        raise UserError("model", name, "is an adapter, not a model", "give its base model, or a merged export")
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        raise UserError("model", name, "is a folder of .gguf files", f"give one of them, for example {ggufs[0]}")
    inner = next((child.parent for child in sorted(folder.glob("*/config.json"))), None)
    mend = f"did you mean {inner}?" if inner else "give a folder made by save_pretrained, a .gguf file or a hub id"
    raise UserError("model", name, "has no config.json", mend)


def _mend_file(path: Path) -> str:
    if (path.parent / "config.json").is_file():
        return f"give its folder: {path.parent}"
    return "give a folder with config.json, a .gguf file or a hub id"


def _near(path: Path) -> str:
    """A mend that names siblings with a similar name; empty if there are none."""
    parent = path.parent
    if not parent.is_dir():
        return ""
    siblings = [child.name for child in parent.iterdir() if child.is_dir() or child.suffix == ".gguf"]
    alike = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(str(parent / name) for name in alike)}?" if alike else ""


def file_sha256(file: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _converted(file: Path, run_model_folder: Path, cache: Path) -> Path:
    """Convert once a file, keep it in the cache, and give the run its own name for it."""
    sha256 = file_sha256(file)
    if _is_conversion_of(run_model_folder, sha256):
        return run_model_folder
    cached = cache / sha256
    if not _is_conversion_of(cached, sha256):
        if not _is_writable(cache):  # a read-only home: the run keeps its own conversion
            shutil.rmtree(run_model_folder, ignore_errors=True)
            convert_gguf(file, run_model_folder, sha256=sha256)
            return run_model_folder
        shutil.rmtree(cached, ignore_errors=True)
        convert_gguf(file, cached, sha256=sha256)
    _link_folder(cached, run_model_folder)
    return run_model_folder


def _is_conversion_of(folder: Path, sha256: str) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and manifest.sha256 == sha256 and has_weights(folder)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _link_folder(source: Path, target: Path) -> None:
    """Make `target` hold the files of `source`: hard links, or copies on another file system. Whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        for file in sorted(source.iterdir()):
            try:
                os.link(file, partial / file.name)
            except OSError:
                shutil.copy2(file, partial / file.name)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def hub_answers(name: str, *, timeout_seconds: float = HUB_TIMEOUT_SECONDS) -> bool:
    """Whether the hub says anything at all about `name` in time; False also when HF_HUB_OFFLINE forbids to ask.

    Asked from a thread: a resolver that gets no answer blocks for longer than any timeout of the HTTP client.
    """
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(_ask_hub(name, timeout_seconds)), daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return bool(answers) and answers[0]


def _ask_hub(name: str, timeout_seconds: float) -> bool:
    from huggingface_hub import HfApi, errors

    try:
        HfApi().model_info(name, timeout=timeout_seconds)
    except errors.HfHubHTTPError:  # an answer, though no good one: the download will say what it means
        return True
    except (
        Exception
    ):  # offline mode, no route, no name, a proxy that refuses: each HTTP client has its own tree of errors
        return False
    return True


def _from_hub(name: str, *, trust_remote_code: bool, weights: bool) -> Path:
    """Download (or find in the hub's cache) description, tokenizer and weights of a hub model."""
    online = hub_answers(name)
    described = _DESCRIPTION_FILES + (["*.py"] if trust_remote_code else [])
    folder = _snapshot(name, described + (_SAFE_WEIGHTS if weights else []), online=online)
    if weights and not has_weights(folder):
        folder = _snapshot(name, described + _PICKLED_WEIGHTS, online=online)
    if not (folder / "config.json").is_file() or (weights and not has_weights(folder)):
        raise UserError(
            "model",
            name,
            f"its copy at {folder} is not complete (config.json and weights are needed)",
            "run once with network access, or give a local folder",
        )
    return folder


def _snapshot(name: str, patterns: list[str], *, online: bool) -> Path:
    """One call of `huggingface_hub.snapshot_download`, its errors told as the user's."""
    from huggingface_hub import errors, snapshot_download

    local = "give a local folder or a .gguf file"
    broken_connection: type[Exception] = getattr(errors, "HTTPError", OSError)  # of whichever HTTP client the hub uses
    try:
        found = snapshot_download(
            name, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"], local_files_only=not online
        )
    except errors.GatedRepoError:
        mend = "accept its terms on the hub, then `hf auth login`"
        raise UserError("model", name, "its owner asks for consent first", mend) from None
    except errors.RepositoryNotFoundError:
        mend = _near(Path(name)) or "check the spelling; for a private model `hf auth login` first"
        raise UserError("model", name, "is neither a local folder nor a model on the hub", mend) from None
    except errors.LocalEntryNotFoundError:
        problem = "is no local folder, is not in the hub's cache, and the hub can't be reached"
        mend = _near(Path(name)) or f"{local}, or run once with network access (and without HF_HUB_OFFLINE)"
        raise UserError("model", name, problem, mend) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        raise UserError("model", name, f"the hub refused it (HTTP {status})", f"try again later, or {local}") from None
    except (OSError, broken_connection) as error:  # no space, no permission, a connection that broke midway
        mend = f"mend that and run again (it goes on where it stopped), or {local}"
        raise UserError("model", name, f"could not be downloaded ({error})", mend) from None
    return Path(found)


__all__ = ["ConvertedModel", "default_cache", "file_sha256", "has_weights", "hub_answers", "resolve_model"]
