"""A launch of ranks on this machine: torchrun's rendezvous and watch, over workers that a warm process forks.

ranks wanted ─▶ rendezvous (c10d, a free port) ─▶ a fork each ─▶ watched until all have ended, or one badly
"""

from __future__ import annotations

import logging
import os
import uuid
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from foretune.training.spare_process import Spare

#: How often the ranks are looked at, seconds.
_MONITOR_SECONDS = 0.03


class WarmAgent(SimpleElasticAgent):
    """`SimpleElasticAgent` whose workers are forks of a warm process."""

    def __init__(self, spec: WorkerSpec, spare: Spare) -> None:
        super().__init__(spec, exit_barrier_timeout=10)
        self._spare = spare
        self._pids: dict[int, int] = {}  # local rank → process id
        self.first: list[int] = []

    def exit_codes(self) -> dict[int, int]:
        """By local rank."""
        exits = self._spare.exits()
        return {rank: exits[pid] for rank, pid in self._pids.items() if pid in exits}

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        spec = worker_group.spec
        ranks = [
            {
                "arguments": list(spec.args),
                "environment": {
                    "RANK": str(worker.global_rank),
                    "LOCAL_RANK": str(worker.local_rank),
                    "WORLD_SIZE": str(worker.world_size),
                    "LOCAL_WORLD_SIZE": str(spec.local_world_size),
                    "GROUP_RANK": str(worker_group.group_rank),
                    "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
                    "MASTER_ADDR": worker_group.master_addr or "127.0.0.1",
                    "MASTER_PORT": str(worker_group.master_port),
                    "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
                    "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
                    "TORCHELASTIC_RESTART_COUNT": "0",
                    "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
                },
            }
            for worker in worker_group.workers
        ]
        pids = self._spare.start(ranks)
        self._pids = {worker.local_rank: pid for worker, pid in zip(worker_group.workers, pids, strict=True)}
        return dict(self._pids)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = self.exit_codes()
        failed = {rank: code for rank, code in codes.items() if code != 0}
        if failed:
            self.first = sorted(failed)
            return RunResult(state=WorkerState.FAILED, failures=failed)  # type: ignore[arg-type]
        if len(codes) == len(self._pids):
            return RunResult(state=WorkerState.SUCCEEDED, return_values=codes)
        return RunResult(state=WorkerState.HEALTHY)

    def _record_worker_events(self, result: RunResult) -> None:
        """Nothing: it wants torchrun's error files, and the ranks' outcomes say more."""

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown()

    def _shutdown(self, *_: Any, **__: Any) -> None:
        self._spare.kill(list(self._pids.values()))


def launch(spare: Spare, *, ranks: int, arguments: list[str]) -> dict[str, Any]:
    """Run ranks on this machine until all have ended; returns what `foretune.training.agent` says of it."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.WARNING)
    handler = get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d",
            endpoint="127.0.0.1:0",  # a port of the system's choice: runs side by side never collide
            run_id=uuid.uuid4().hex,
            min_nodes=1,
            max_nodes=1,
            local_addr="127.0.0.1",
        )
    )
    spec = WorkerSpec(
        role="default",
        local_world_size=ranks,
        entrypoint="foretune.training.worker",
        args=tuple(arguments),
        rdzv_handler=handler,
        max_restarts=0,
        monitor_interval=_MONITOR_SECONDS,
        master_addr="127.0.0.1",
    )
    agent = WarmAgent(spec, spare)
    try:
        agent.run()
    finally:
        agent._shutdown()
        handler.shutdown()
    return {"exits": agent.exit_codes(), "first": agent.first}
