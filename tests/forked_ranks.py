"""Starts the ranks of a script as torchrun would, from one process that has imported everything.

    python tests/forked_ranks.py WORLD_SIZE[,WORLD_SIZE...] SCRIPT [ARGUMENT...]

To import torch, transformers and DeepSpeed takes 5 to 10 s of a core, to fork none; training does the same
(`foretune.training.spare`). Several world sizes are launched one after the other. Exits with 1 as soon as a rank has
failed; the others of its launch are killed then.
"""

from __future__ import annotations

import gc
import os
import runpy
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path

from forks import end_after

from foretune.distributed import die_with_parent
from foretune.engine import import_late_modules

IMPORTED = (
    "peft", "torch._dynamo", "transformers.integrations.deepspeed", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama", "foretune.training.build", "foretune.training.loop",
)  # fmt: skip


def main() -> int:
    """Import, then one launch for every world size."""
    world_sizes = [int(size) for size in sys.argv[1].split(",")]
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    for name in IMPORTED:
        import_module(name)
    import_late_modules()
    gc.collect()
    gc.freeze()  # the collector would otherwise write to, and so copy, every inherited page
    return int(not all(_launch(size) for size in world_sizes))


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
    sys.exit(main())
