"""What is here, what is missing, what will hurt; each with what it means and the mend.

In: this machine.  Out: a list of `Finding`s. Nothing is changed, nothing is required: what is missing is a finding and
never an error. Versions come from package metadata (importing them all takes longer than a doctor may).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import psutil

Level = Literal["good", "note", "bad"]

_REQUIRED = ("torch", "deepspeed", "transformers", "peft", "datasets", "accelerate", "safetensors")
_EXTRAS = {"gguf": "models from .gguf files", "serve": "`foretune serve`", "tensorboard": "curves in TensorBoard"}
_GIB = 2**30
#: Ranks of one machine exchange through /dev/shm: NCCL takes some 10 MB a GPU, a container's default is 64 MB in all.
_SHM_BYTES = 1 * _GIB
_HUB_TIMEOUT_SECONDS = 3.0
_COMMAND_TIMEOUT_SECONDS = 5.0


class Finding(NamedTuple):
    """One thing looked at: good, a note (works, but know it), or bad (something will fail)."""

    level: Level
    name: str
    value: str
    meaning: str
    mend: str = ""

    def as_json(self) -> dict[str, str]:
        """Plain JSON values."""
        return dict(zip(self._fields, self, strict=True))


def examine(folder: Path | None = None) -> list[Finding]:
    """Look at everything; takes a few seconds, most of it torch's import.

    Args:
        folder: where runs are going to be written; the current folder if not given.
    """
    looks = (
        _python,
        _packages,
        _extras,
        _devices,
        _cpu,
        _memory,
        lambda: _disk(folder or Path.cwd()),
        _shm,
        _compiler,
        _hub,
    )
    return [finding for look in looks for finding in look()]


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding("good", "python", version, f"{platform.system()} {platform.release()}, {platform.machine()}")
    if platform.system() != "Linux":
        yield Finding(
            "note", "system", platform.system(), "only Linux is tested; DeepSpeed needs it", "use Linux, or a container"
        )


def _packages() -> Iterator[Finding]:
    for name in _REQUIRED:
        version = _version(name)
        if version is None:
            yield Finding("bad", name, "missing", "training needs it", "pip install foretune, in this environment")
        else:
            yield Finding("good", name, version, "")


def _extras() -> Iterator[Finding]:
    for extra, use in _EXTRAS.items():
        missing = [name for name in _packages_of(extra) if _version(name) is None]
        if missing:
            mend = f"pip install 'foretune[{extra}]'"
            yield Finding("note", f"extra {extra}", "not installed", f"{use} needs {', '.join(missing)}", mend)
        else:
            yield Finding("good", f"extra {extra}", "installed", use)


def _devices() -> Iterator[Finding]:
    """GPUs as the driver lists them, and whether torch can use them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader,nounits"]
    listed = [line.split(", ") for line in _output(query).splitlines() if line.count(", ") == 3]
    for index, (name, total, used, driver) in enumerate(listed):
        memory = f"{int(total) / 1024:.0f} GiB, {int(used) / 1024:.1f} in use, driver {driver}"
        yield Finding("good", f"GPU {index}", name, memory)
    if len({name for name, *_ in listed}) > 1:
        yield Finding(
            "note", "GPUs", "of different kinds", "every step waits for the slowest", "choose with CUDA_VISIBLE_DEVICES"
        )
    try:
        import torch
    except Exception as error:  # a broken installation raises OSError, ImportError or worse
        mend = "pip install --force-reinstall torch"
        yield Finding("bad", "torch", "can't be imported", f"{type(error).__name__}: {error}", mend)
        return
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported()
        meaning = "runs in bf16" if bf16 else "these GPUs have no bf16: runs in fp16 with loss scaling"
        value = f"{torch.cuda.device_count()} visible, CUDA {torch.version.cuda}"
        yield Finding("good" if bf16 else "note", "GPUs in torch", value, meaning)
    elif listed:
        built = torch.version.cuda or "none: a CPU build"
        yield Finding(
            "bad",
            "GPUs in torch",
            "not usable",
            f"torch is built for CUDA {built}, and does not get along with the driver or was told to see no GPU",
            "check CUDA_VISIBLE_DEVICES; else install the torch that fits the driver",
        )
    else:
        yield Finding("note", "GPUs", "none", "trains on the CPU: for models below about 0.5 B parameters")


def _cpu() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    limited = f", limited to {quota:.1f} by the container" if quota and quota < cores else ""
    yield Finding("good", "cores", f"{cores}{limited}", "ranks on a CPU share them")
    flags = _read("/proc/cpuinfo")
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        yield Finding("good", "bf16 on the CPU", "in hardware", "fp32 is still the default on a CPU")
    else:
        yield Finding(
            "note",
            "bf16 on the CPU",
            "emulated",
            "about 20 times slower than fp32 here, which is the default",
            "leave train.precision at auto when training on this CPU",
        )


def _memory() -> Iterator[Finding]:
    machine = psutil.virtual_memory()
    limit = _cgroup_limit()
    total = min(machine.total, limit or machine.total)
    available = min(machine.available, total)
    meaning = "limited by the container" if limit and limit < machine.total else "of the machine"
    level: Level = "good" if available >= 4 * _GIB else "note"
    mend = "" if level == "good" else "end other programs; smaller models, method: lora"
    yield Finding(level, "memory", f"{available / _GIB:.1f} GiB free of {total / _GIB:.1f}", meaning, mend)


def _disk(folder: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        yield Finding("note", "disk", "not writable", f"{folder}: runs can't be written here", "give --out elsewhere")
    level: Level = "good" if free >= 20 * _GIB else "note"
    meaning = f"at {folder}; a checkpoint of full fine-tuning takes 12 to 16 bytes a parameter"
    yield Finding(
        level, "disk", f"{free / _GIB:.1f} GiB free", meaning, "" if level == "good" else "give --out elsewhere"
    )


def _shm() -> Iterator[Finding]:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return
    size = shutil.disk_usage(shm).total
    if size < _SHM_BYTES:
        yield Finding(
            "note",
            "/dev/shm",
            f"{size / 2**20:.0f} MiB",
            "ranks of one machine exchange through it; NCCL fails when it is full",
            "docker run --shm-size=8g (Kubernetes: an emptyDir with medium: Memory)",
        )
    else:
        yield Finding("good", "/dev/shm", f"{size / _GIB:.1f} GiB", "ranks of one machine exchange through it")


def _compiler() -> Iterator[Finding]:
    for name in ("g++", "ninja", "nvcc"):
        where = shutil.which(name)
        use = "; only DeepSpeed's own CPU Adam (optimizer offload) is built with it" if name in ("g++", "ninja") else ""
        yield Finding("good", name, where or "absent", f"not needed{use}")


def _hub() -> Iterator[Finding]:
    """Whether models and data sets can be fetched by name: one connection, no request."""
    try:
        from huggingface_hub import constants
    except ImportError:
        yield Finding("bad", "hub", "huggingface_hub is missing", "models can't be fetched", "pip install foretune")
        return
    if constants.HF_HUB_OFFLINE:
        yield Finding("note", "hub", "offline by HF_HUB_OFFLINE", "only local folders and what is in the cache")
        return
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    proxy = next((os.environ[key] for key in ("HTTPS_PROXY", "https_proxy") if os.environ.get(key)), None)
    if proxy and (through := urlsplit(proxy if "//" in proxy else f"//{proxy}")).hostname:
        address, port = through, through.port or 80
    start = time.perf_counter()
    try:
        socket.create_connection((address.hostname or "", port), timeout=_HUB_TIMEOUT_SECONDS).close()
    except OSError as error:
        reason = f"{address.hostname} does not answer ({error}); only local folders and what is in the cache"
        yield Finding("note", "hub", "not reachable", reason, "give local folders; or set HF_ENDPOINT, HTTPS_PROXY")
        return
    yield Finding("good", "hub", "reachable", f"{constants.ENDPOINT}, {1000 * (time.perf_counter() - start):.0f} ms")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages_of(extra: str) -> list[str]:
    """What an extra of foretune's installs, as its own metadata says (``uvicorn>=0.30; extra == "serve"``)."""
    try:
        requirements = importlib.metadata.requires("foretune") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder, not installed
        return []
    wanted = [text for text in requirements if f'extra == "{extra}"' in text.replace("'", '"')]
    return [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in wanted]


def _output(command: list[str]) -> str:
    """What a command prints; nothing if it is missing, fails or hangs."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": _COMMAND_TIMEOUT_SECONDS, "check": True}
    try:
        return str(subprocess.run(command, **options).stdout)
    except (OSError, subprocess.SubprocessError):
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cgroup_limit() -> int | None:
    """Bytes that the container may use; None without a limit (version 1 writes a huge number for that)."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(path).strip()
        if text.isdigit() and int(text) < 2**60:
            return int(text)
    return None


def _cpu_quota() -> float | None:
    """Cores' worth of time that the container gets."""
    fields = _read("/sys/fs/cgroup/cpu.max").split()
    return int(fields[0]) / int(fields[1]) if len(fields) == 2 and fields[0].isdigit() else None
