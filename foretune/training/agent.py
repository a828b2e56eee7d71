"""torchrun's elastic agent, with warm spares: it does the rendezvous and watches, `training.spare` forks the ranks.

    python -m foretune.training.agent RUN

in (stdin): one JSON line a launch, ``{"ranks": N, "arguments": [...]}``   out (stdout): one line for each launch,
``{"exits": {"0": code, ...}, "first": [0]}`` (a negative code is a signal's number; `first` are the ranks that had
failed when the agent noticed and killed the rest).

It stays between launches, so that a restart costs a fork and a rendezvous. When one rank ends badly the others are
killed at once: they could only wait for it. Restarts are the supervisor's decision (``max_restarts`` is 0 here).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
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

from foretune.distributed import die_with_parent
from foretune.training.spare import messages_alone_on_stdout

#: How often the ranks are looked at, seconds.
_MONITOR_SECONDS = 0.03


class Spare:
    """The warm process and what it says."""

    def __init__(self, run: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "foretune.training.spare", run], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._pending = b""
        self._started: list[int] = []
        self._exits: dict[int, int] = {}

    def start(self, ranks: list[dict[str, Any]]) -> list[int]:
        """Fork ranks; returns their process ids."""
        self._started, self._exits = [], {}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ranks": ranks}).encode() + b"\n")
        self._process.stdin.flush()
        while not self._started:
            self._listen()
            time.sleep(0.005)
        return self._started

    def exits(self) -> dict[int, int]:
        """Exit code by process id, of those that ended."""
        self._listen()
        return dict(self._exits)

    def kill(self, pids: list[int]) -> None:
        """SIGKILL those of them that live, and wait until they are gone."""
        for pid in pids:
            if pid not in self.exits():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        while any(pid not in self.exits() for pid in pids):
            time.sleep(0.005)

    def wait_until_ready(self) -> None:
        """Until everything is imported."""
        while not self._ready:
            self._listen()
            time.sleep(0.01)

    _ready = False

    def _listen(self) -> None:
        assert self._process.stdout is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"the spare process ended with {self._process.returncode}")
        data = self._process.stdout.read()
        if not data:
            return
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            self._ready = self._ready or "ready" in message
            self._started = message.get("started", self._started)
            if "exited" in message:
                pid, code = message["exited"]
                self._exits[pid] = code


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
    """Run ranks on this machine until all have ended; returns what is said of it, see the head of this file."""
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


def main() -> None:
    """Serve launches until stdin closes."""
    die_with_parent()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.WARNING)
    say = messages_alone_on_stdout()
    spare = Spare(sys.argv[1])
    spare.wait_until_ready()
    for line in sys.stdin:
        order = json.loads(line)
        say(launch(spare, ranks=order["ranks"], arguments=order["arguments"]))


if __name__ == "__main__":
    main()
