"""This process among the others: rank and world size from torchrun's variables, dying with the parent, leaving.

The environment is read here once and handed on as values; no other module looks at it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class RankInfo:
    """Who this process is. `local_rank` counts within its node."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def rank_info() -> RankInfo:
    """Read what torchrun says of this process; a process started without it is rank 0 of 1."""
    env = os.environ
    return RankInfo(
        rank=int(env.get("RANK", "0")),
        local_rank=int(env.get("LOCAL_RANK", "0")),
        world_size=int(env.get("WORLD_SIZE", "1")),
        local_world_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
    )


def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when its parent dies (Linux; prctl(2), PR_SET_PDEATHSIG).

    Ranks otherwise train on after their agent was killed, holding the GPU and writing into the run.
    """
    pr_set_pdeathsig = 1
    parent = os.getppid()
    try:
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    except (OSError, AttributeError):  # not Linux: nothing of the kind exists
        return
    if os.getppid() != parent:  # the parent died before the call: nothing would ever tell us
        os.kill(os.getpid(), signal.SIGKILL)


def leave(code: int = 0) -> NoReturn:
    """End this process at once, without the interpreter's shutdown: for a process that had a process group.

    gloo's threads may still hold tensors then. Freed after the interpreter has begun to end, they abort the process
    ("terminate called without an active exception") although all is done; or they wait for ever.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
