"""Starts the ranks of a script as torchrun would, in forks of one process that has imported everything (`forks`).

Training does the same (`foretune.training.spare`).
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from forks import WarmProcess, end_after, serve

from foretune.distributed import die_with_parent

IMPORTED = (
    "peft", "torch._dynamo", "transformers.integrations.deepspeed", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama", "foretune.training.build", "foretune.training.loop",
)  # fmt: skip


class StartRanks(Protocol):
    def __call__(
        self, world_sizes: Sequence[int], script: Path, *arguments: object, timeout: float = 500
    ) -> subprocess.CompletedProcess[str]: ...


@contextmanager
def forked_ranks() -> Iterator[StartRanks]:
    """A function that starts the ranks of a script, one world size after the other, and waits for them.

    The exit code is 1 as soon as a rank has failed; the others of its launch are killed then.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    with WarmProcess(__file__, environment) as process:

        def start(
            world_sizes: Sequence[int], script: Path, *arguments: object, timeout: float = 500
        ) -> subprocess.CompletedProcess[str]:
            work = {"world_sizes": list(world_sizes), "script": str(script), "arguments": list(map(str, arguments))}
            return process.run(work, environment=environment, timeout=timeout)

        yield start


def _load() -> None:
    from foretune.engine import import_late_modules

    for name in IMPORTED:
        import_module(name)
    import_late_modules()


def _launches(work: dict[str, Any]) -> int:
    sys.argv = [work["script"], *work["arguments"]]
    sys.path.insert(0, str(Path(work["script"]).parent))
    return int(not all(_launch(size) for size in work["world_sizes"]))


def _launch(world_size: int) -> bool:
    """Fork the ranks of one launch, and wait for all of them; False as soon as one fails."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    living = {_fork(rank, world_size, port) for rank in range(world_size)}
    while living:
        pid, status = os.wait()
        living.discard(pid)
        if status:
            for other in living:
                os.kill(other, signal.SIGKILL)
            return False
    return True


def _fork(rank: int, world_size: int, port: int) -> int:
    """The process id of a rank. The child runs the script and never returns."""
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
        end_after(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
    return pid


if __name__ == "__main__":
    serve(_launches, _load)
