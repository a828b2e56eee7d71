"""The process group of a launch: opened once per process, after all data is prepared (waiting ranks time out)."""

from __future__ import annotations

import os
import socket
import sys
import types
from datetime import timedelta

import torch

from foretune.distributed import RankInfo

#: A collective that waits longer than this means a dead or hung peer. DeepSpeed's own default is 10 minutes.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def open_group(rank: RankInfo, *, deterministic: bool = False) -> torch.device:
    """Join the process group that torchrun's variables describe and return this rank's device.

    A process that torchrun did not start becomes a group of one, on a port the system chooses. `deterministic` lets
    torch choose only algorithms that repeat bit by bit (slower on a GPU).
    """
    import deepspeed

    torch.use_deterministic_algorithms(deterministic)

    _without_compiler()
    _without_muon()
    if torch.cuda.is_available():
        device = torch.device("cuda", rank.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if "MASTER_ADDR" not in os.environ:  # the group of one; deepspeed looks for MPI when these are missing
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"
        )
    deepspeed.init_distributed(verbose=False, timeout=COLLECTIVE_TIMEOUT)
    return device


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def close_group() -> None:
    """Leave the process group, so that no peer waits for this process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _without_compiler() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives on a CPU.

    The JIT needs g++ and ninja on PATH and takes 36 s the first time; without them every CPU run would die in
    ``init_distributed``. gloo does the same work.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _without_muon() -> None:
    """Keep `deepspeed.initialize` from importing an optimizer that is not used, and torch's compiler with it.

    DeepSpeed only asks whether the optimizer is a ``MuonWithAuxAdam``; none is, so a class of that name will do.
    """
    name = "deepspeed.runtime.zero.muon.muon_optimizer"
    if name not in sys.modules:
        stub = types.ModuleType(name)
        stub.MuonWithAuxAdam = type("MuonWithAuxAdam", (), {})  # type: ignore[attr-defined]
        sys.modules[name] = stub
