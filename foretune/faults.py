"""The seam through which faults are injected on purpose. Nothing is armed unless a file says so.

    --faults FILE (worker's command line) ──▶ `Faults` ──fire(point, step)──▶ kill | stop | hold | raise | distort

FILE is JSON, ``{"faults": [...], "broken": [...]}``. Each fault fires once over all launches of a run: before it acts
it leaves ``FILE.fired-NUMBER`` beside the file, with the rank's Python stack as proof of where it was. `broken` names
what a deliberately broken build leaves out, so that the proof can be shown to notice.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Action = Literal["kill", "stop", "hold", "raise", "out_of_memory", "nan", "spike", "no_space"]
Point = Literal["data", "forward", "backward", "reduction", "step", "save", "saved", "commit", "clean"]

SUPERVISOR = -1
ALL_RANKS = -2

#: How long a victim that must die inside a collective waits for its peers to be in it, seconds.
_PEER_SECONDS = 20.0


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        action: kill (SIGKILL to itself), stop (SIGSTOP), hold (stay in the phase for `seconds`, to be killed from
            outside), raise (an exception), out_of_memory (the device's), nan, spike (of a value), no_space (ENOSPC).
        point: where.
        step: with so many steps done.
        rank: the victim; or `SUPERVISOR`, or, for what distorts, `ALL_RANKS`.
        seconds: of a hold.
    """

    action: Action
    point: Point
    step: int
    rank: int = 0
    seconds: float = 0.0


class InjectedError(RuntimeError):
    """What an armed fault raises."""


def write_faults(path: Path, faults: Sequence[Fault], *, broken: Sequence[str] = ()) -> None:
    """Arm faults, for a worker that is given this file."""
    path.write_text(json.dumps({"faults": [asdict(fault) for fault in faults], "broken": list(broken)}))


def fired_mark(path: Path, number: int) -> Path:
    """The file that says that fault `number` fired; it holds the victim's stack."""
    return path.with_name(f"{path.name}.fired-{number}")


class Faults:
    """The faults of one process. Without a file nothing is armed, and `fire` returns at once."""

    def __init__(self, path: Path | None, *, rank: int) -> None:
        self._path, self._rank = path, rank
        self._faults: list[tuple[int, Fault]] = []
        self._broken: tuple[str, ...] = ()
        if path is not None:
            values = json.loads(path.read_text())
            self._faults = [(number, Fault(**fault)) for number, fault in enumerate(values["faults"])]
            self._broken = tuple(values["broken"])

    @property
    def armed(self) -> bool:
        """Whether there is anything to inject, for any rank."""
        return bool(self._faults)

    def is_broken(self, what: str) -> bool:
        """Whether this build leaves `what` out on purpose."""
        return what in self._broken

    def fire(self, point: Point, step: int) -> None:
        """Do what is armed for this rank, point and step, once.

        Raises:
            InjectedError: armed as raise or out_of_memory (its text tells).
            OSError: armed as no_space.
        """
        for number, fault in self._faults:
            if fault.point != point or fault.step != step or fired_mark(self._file, number).exists():
                continue
            if fault.rank != self._rank:
                if point == "reduction":
                    self._peer_mark(number, self._rank).touch()
                continue
            if fault.action in ("nan", "spike"):
                continue  # these distort a value: `distorts`
            if point == "reduction":
                self._wait_for_a_peer(number)
            self._mark(number)
            self._act(fault, step)

    def distorts(self, action: Action, step: int) -> bool:
        """Whether a value is to be distorted here, now: throughout that step, in every launch that comes to it."""
        for number, fault in self._faults:
            if fault.action == action and fault.step == step and fault.rank in (self._rank, ALL_RANKS):
                if not fired_mark(self._file, number).exists():
                    self._mark(number)
                return True
        return False

    @property
    def _file(self) -> Path:
        assert self._path is not None
        return self._path

    def _mark(self, number: int) -> None:
        with fired_mark(self._file, number).open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.flush()
            os.fsync(file.fileno())

    def _peer_mark(self, number: int, rank: int) -> Path:
        return self._file.with_name(f"{self._file.name}.inside-{number}-{rank}")

    def _wait_for_a_peer(self, number: int) -> None:
        """Until some peer has entered the collective that this rank is about to miss."""
        deadline = time.monotonic() + _PEER_SECONDS
        while time.monotonic() < deadline:
            if any(self._file.parent.glob(f"{self._file.name}.inside-{number}-*")):
                time.sleep(0.05)  # from the mark into the collective itself
                return
            time.sleep(0.002)

    @staticmethod
    def _act(fault: Fault, step: int) -> None:
        if fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.action == "hold":
            time.sleep(fault.seconds)
        elif fault.action == "no_space":
            raise OSError(errno.ENOSPC, "No space left on device (injected)")
        elif fault.action == "out_of_memory":
            raise InjectedError("CUDA out of memory (injected)")
        elif fault.action == "raise":
            raise InjectedError(f"injected at {fault.point}, step {step}")


NO_FAULTS = Faults(None, rank=0)
