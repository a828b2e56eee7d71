"""What every bench needs: the machine and the versions in a result, a result's file, memory of a process tree."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("foretune", "torch", "deepspeed", "transformers", "peft", "datasets", "tokenizers", "trl", "liger-kernel",
             "unsloth", "triton", "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl")  # fmt: skip
_SAMPLE_SECONDS = 1.0  # reading the page tables of large processes takes the cores that are measured


def machine() -> dict[str, Any]:
    """Name of the processor and the accelerator, cores, memory, Python and package versions."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    facts: dict[str, Any] = {
        "processor": _first(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _first(Path("/proc/meminfo"), "MemTotal"),
        "python": platform.python_version(),
        "versions": versions,
    }
    if chosen := {name: value for name, value in os.environ.items() if name.startswith("TORCHINDUCTOR_")}:
        facts["environment"] = chosen
    try:
        import torch

        if torch.cuda.is_available():
            facts["device"] = torch.cuda.get_device_name()
    except ImportError:
        pass
    return facts


def save_result(name: str, values: dict[str, Any], *, folder: Path | None = None) -> Path:
    """Write ``FOLDER/DATE-NAME.json`` (bench/results if not said otherwise); a later run of a day replaces it."""
    now = datetime.now(UTC)
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{now:%Y-%m-%d}-{name}.json"
    path.write_text(json.dumps({"date": f"{now:%Y-%m-%dT%H:%MZ}", **values}, indent=1) + "\n")
    print(f"written: {path}")
    return path


def measured_in_a_child(
    script: str, spec: dict[str, Any], folder: Path, *, name: str, timeout_seconds: float, **environment: str
) -> dict[str, Any]:
    """What ``python SCRIPT --child SPEC ANSWER`` writes as its answer; ``{"error": …}`` with its last words if nothing.

    A process of its own, as every launch has it: fresh, and with memory in expandable segments.
    """
    file, answer, log = (folder / f"{name}{end}" for end in ("-spec.json", ".json", ".log"))
    file.write_text(json.dumps(spec))
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | environment
    with log.open("w") as out:
        try:
            subprocess.run([sys.executable, script, "--child", str(file), str(answer)], stdout=out, stderr=out,
                           env=environment, timeout=timeout_seconds)  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"{name}: cut off after {timeout_seconds:.0f} s", flush=True)
    if not answer.is_file():
        return {"error": log.read_text(errors="replace")[-1500:]}
    result: dict[str, Any] = json.loads(answer.read_text())
    return result


def assignment_of(**given: Any) -> Any:
    """What `foretune.training.build` reads of a rank's assignment; notes are printed instead of journalled."""

    def tell(kind: Any, **payload: Any) -> None:
        print(kind, payload, flush=True)

    return SimpleNamespace(journal=None, packs=None, tell=tell, **given)


class Watch:
    """Peak memory of a process and all its descendants while it is open, in bytes.

    ``pss``: proportional share, pages of mapped files included. ``anonymous``: what the processes allocated.
    """

    def __init__(self, pid: int | None) -> None:
        assert pid is not None
        self._pid, self._stop = pid, threading.Event()
        self._pss = self._anonymous = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def peaks(self) -> dict[str, int]:
        """``{"peak_pss_bytes", "peak_anonymous_bytes"}``."""
        return {"peak_pss_bytes": self._pss, "peak_anonymous_bytes": self._anonymous}

    def _run(self) -> None:
        import psutil

        while not self._stop.wait(_SAMPLE_SECONDS):
            try:
                root = psutil.Process(self._pid)
                pids = [self._pid, *(child.pid for child in root.children(recursive=True))]
            except psutil.Error:
                continue
            sums = [_memory_of(pid) for pid in pids]
            self._pss = max(self._pss, sum(pss for pss, _ in sums))
            self._anonymous = max(self._anonymous, sum(anonymous for _, anonymous in sums))


def _memory_of(pid: int) -> tuple[int, int]:
    pss = anonymous = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                pss = int(line.split()[1]) * 1024
            elif line.startswith("Pss_Anon:"):
                anonymous = int(line.split()[1]) * 1024
    except OSError:
        pass
    return pss, anonymous


def _first(path: Path, key: str) -> str | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)
