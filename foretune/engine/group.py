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

    if deterministic:  # it is off; saying so would import torch's compiler
        torch.use_deterministic_algorithms(True)

    without_compiler()
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


def import_late_modules() -> None:
    """Import what DeepSpeed only imports on the way to its first step, for a process that is forked into ranks.

    (Not its operators' builders: they would ask the GPU for its kind.)
    """
    import deepspeed.module_inject.auto_ep_layer
    from deepspeed.compile.util import is_deepcompile_supported

    if is_deepcompile_supported():  # on a GPU: every engine imports it, used or not
        import deepspeed.compile.backend  # noqa: F401  # and most of torch's compiler: 2.6 s


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def close_group() -> None:
    """Leave the process group, so that no peer waits for this process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def without_compiler() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives on a CPU.

    The JIT needs g++ and ninja on PATH and takes 36 s the first time; without them every CPU run would die in
    ``init_distributed``. gloo does the same work. DeepSpeed looks into this table for that operator alone; left to
    itself it would fill it by trying compilers and asking the GPU.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def _without_muon() -> None:
    """Keep DeepSpeed from importing an optimizer that is not used, and torch's compiler with it.

    ``initialize`` only asks whether the optimizer is a ``MuonWithAuxAdam``; none is, so a class of that name will do.
    The first step imports ``muon_update`` and never calls it (2 s, in every rank, on quiet cores).
    """
    for name, member in (("muon_optimizer", "MuonWithAuxAdam"), ("original_muon", "muon_update")):
        path = f"deepspeed.runtime.zero.muon.{name}"
        if path not in sys.modules:
            stub = types.ModuleType(path)
            setattr(stub, member, type(member, (), {}))
            sys.modules[path] = stub
