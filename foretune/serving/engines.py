"""Which engine answers, and how it is started, watched and ended.

model folder ──choose──▶ command ──keeper──▶ engine on a Unix socket in a private folder ──ready──▶ `RunningEngine`

An engine runs offline, with a hub cache of its own (`transformers serve` lists the cache and fails without one), in a
folder where the only model is a link to ours. Nothing of the server's key reaches it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Self, get_args

from foretune.errors import MachineFault, UserError
from foretune.logger import get_logger
from foretune.serving.dialects import ENGINE_MODEL, Dialect, TransformersDialect, VllmDialect

_log = get_logger(__name__)

EngineName = Literal["transformers", "vllm"]

_GRACE_SECONDS = 5.0  # what an engine gets to end by itself; vLLM removes its shared memory in that time
_LOG_LINES = 25
_SOCKET_PATH_LIMIT = 100  # bytes; sun_path holds 108 on Linux, 104 elsewhere
_STILL_LOADING_SECONDS = 30.0


def choose_engine(wanted: str) -> EngineName:
    """vLLM where it is installed and a GPU is there, `transformers serve` everywhere else.

    Args:
        wanted: ``auto`` or the name of an engine.

    Raises:
        UserError: no such engine, or vLLM is asked for and can't run here.
    """
    if wanted not in {"auto", *get_args(EngineName)}:
        raise UserError("--engine", wanted, "is no serving engine", "use auto, transformers or vllm")
    if wanted == "transformers":
        return "transformers"
    installed = importlib.util.find_spec("vllm") is not None
    if not installed:
        if wanted == "vllm":
            raise UserError("--engine", "vllm", "vLLM is not installed", "pip install vllm, or leave --engine out")
        return "transformers"
    import torch

    if torch.cuda.is_available():
        return "vllm"
    if wanted == "vllm":
        raise UserError("--engine", "vllm", "there is no GPU here, and vLLM needs one", "use --engine transformers")
    return "transformers"


def dialect_of(name: EngineName) -> Dialect:
    """How to talk to an engine."""
    return VllmDialect() if name == "vllm" else TransformersDialect()


def engine_command(name: EngineName, socket: Path) -> list[str]:
    """The command line of an engine. ``-P``: the working folder is no place to import code from."""
    python = [sys.executable, "-P", "-m"]
    if name == "transformers":
        return [*python, "foretune.serving.child", "transformers", str(socket), ENGINE_MODEL]
    quiet = ["--no-enable-log-requests", "--disable-log-stats", "--disable-uvicorn-access-log"]
    address = ["--uds", str(socket), "--served-model-name", ENGINE_MODEL]
    return [*python, "vllm.entrypoints.cli.main", "serve", ENGINE_MODEL, *address, *quiet]


@dataclass
class RunningEngine:
    """An engine in its own processes. Use as a context manager: leaving it ends them.

    Attributes:
        name: which engine.
        socket: where it listens once it is ready.
        folder: its private folder: link to the model, socket, hub cache, log.
    """

    name: EngineName
    socket: Path
    folder: tempfile.TemporaryDirectory[str]
    keeper: subprocess.Popen[bytes]

    @classmethod
    def start(cls, name: EngineName, model_folder: Path) -> RunningEngine:
        """Start an engine on a model; returns at once. Raises `MachineFault` if no process can be started."""
        parent = None if len(os.fsencode(tempfile.gettempdir())) < _SOCKET_PATH_LIMIT - 40 else "/tmp"
        folder = tempfile.TemporaryDirectory(prefix="foretune-serve-", dir=parent, ignore_cleanup_errors=True)  # 0700
        root = Path(folder.name)
        (root / ENGINE_MODEL).symlink_to(model_folder.resolve(), target_is_directory=True)
        (root / "hub").mkdir()
        socket = root / "engine.sock"
        keeper = ["foretune.serving.child", "keep", folder.name, str(_GRACE_SECONDS)]
        command = [sys.executable, "-P", "-m", *keeper, *engine_command(name, socket)]
        try:
            with (root / "log").open("wb") as log:
                process = subprocess.Popen(
                    command,
                    cwd=root,
                    env=_environment(root),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for the server, which then ends the engine in order
                )
        except OSError as error:
            folder.cleanup()
            raise MachineFault(f"the serving engine could not be started: {error}") from error
        return cls(name=name, socket=socket, folder=folder, keeper=process)

    def wait_until_ready(self) -> None:
        """Wait for the model to be loaded, however long it takes. Raises `MachineFault` if the engine ends instead."""
        import httpx2

        started = told = time.monotonic()
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(self.socket)), base_url="http://engine") as client:
            while True:
                self.check()
                if self.socket.exists():
                    try:
                        if client.get("/health", timeout=5.0).status_code == 200:
                            return
                    except httpx2.HTTPError:
                        pass
                if time.monotonic() - told > _STILL_LOADING_SECONDS:
                    told = time.monotonic()
                    _log.info("%s is still loading the model (%.0f s)", self.name, told - started)
                time.sleep(0.1)

    def check(self) -> None:
        """Raises `MachineFault`, with the end of the engine's log, if the engine is no longer running."""
        code = self.keeper.poll()
        if code is not None:
            raise MachineFault(f"the serving engine ({self.name}) ended with exit status {code}\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The last lines that the engine wrote."""
        path = Path(self.folder.name) / "log"
        if not path.is_file():
            return ""
        lines = path.read_bytes()[-20_000:].decode(errors="replace").splitlines()
        return "\n".join(f"  | {line}" for line in lines[-_LOG_LINES:])

    def stop(self) -> None:
        """End the engine and all it started, and remove its folder. Safe to call twice."""
        pipe: IO[bytes] | None = self.keeper.stdin
        assert pipe is not None, "the keeper is started with a pipe"
        pipe.close()
        try:
            self.keeper.wait(timeout=_GRACE_SECONDS * 2)
        except subprocess.TimeoutExpired:
            self.keeper.kill()  # PR_SET_PDEATHSIG takes the engine along
            self.keeper.wait()
        self.folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _environment(root: Path) -> dict[str, str]:
    """The engine's environment: offline, quiet, with a hub cache that exists, and able to import this very foretune."""
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(path))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(root / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
