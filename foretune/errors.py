"""The tree of errors. Everything foretune raises on purpose is one of these.

ForetuneError
├── UserError            the user's fault: one dotted field, the value, the mend.    exit 2, no traceback
│   └── ConfigError      several user faults found at once in one configuration.     exit 2
├── NoPlanFits           nothing fits the hardware; says what would.                 exit 3
├── MachineFault         the machine's fault: rank, step, cause. The supervisor decides; it ends as
│   └── TrainingStopped  it could not be recovered; names the last good checkpoint.  exit 4
├── VerificationFailed   an artifact does not say what training said; not written.   exit 1
└── Preempted            asked to stop, saved; start the same command again.         exit 75

What is our own fault is an ``assert`` or any other exception, and ends as a traceback with exit code 1.
Foreign errors (CUDA out of memory, NCCL, DeepSpeed) are translated at one door, `foretune.engine`: ``raise … from``.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """What the process says to the shell, and nothing else may be said."""

    DONE = 0
    OUR_BUG = 1
    USER_FAULT = 2
    NO_PLAN_FITS = 3
    TRAINING_STOPPED = 4
    PREEMPTED = 75  # EX_TEMPFAIL: schedulers requeue on it


class ForetuneError(Exception):
    """Base of all deliberate errors."""

    exit_code: ExitCode = ExitCode.OUR_BUG


class UserError(ForetuneError):
    """Something only the user can mend.

    Args:
        field: dotted configuration key or command-line option, e.g. ``"train.learning_rate"``.
        value: what was given there.
        problem: one sentence that says what is wrong with the value.
        mend: one sentence that says what to do, complete enough to act on.
    """

    exit_code = ExitCode.USER_FAULT

    def __init__(self, field: str, value: object, problem: str, mend: str) -> None:
        self.field, self.value, self.problem, self.mend = field, value, problem, mend
        super().__init__(f"{field}: {problem}")

    def __str__(self) -> str:
        given = "" if self.value is None else f" = {_shortened(repr(self.value))}"
        return f"{self.field}{given}: {self.problem}\n  mend: {self.mend}"

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str, str]]:  # crosses process pools whole
        return type(self), (self.field, self.value, self.problem, self.mend)


def _shortened(text: str, *, width: int = 200) -> str:
    """`text`, cut in the middle where it would fill the screen."""
    half = (width - 3) // 2
    return text if len(text) <= width else f"{text[:half]}...{text[-half:]}"


class ConfigError(UserError):
    """All faults of one configuration, reported together so that one edit mends them all."""

    def __init__(self, faults: Sequence[UserError]) -> None:
        assert faults, "a ConfigError needs at least one fault"
        self.faults = list(faults)
        first = self.faults[0]
        super().__init__(first.field, first.value, first.problem, first.mend)

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[UserError]]]:  # type: ignore[override]
        return type(self), (self.faults,)


class NoPlanFits(ForetuneError):
    """No strategy fits the hardware.

    Args:
        needed: one line per rejected strategy with the figure that rejected it.
        mend: the cheapest change that would make one fit.
    """

    exit_code = ExitCode.NO_PLAN_FITS

    def __init__(self, needed: Sequence[str], mend: str) -> None:
        self.needed, self.mend = list(needed), mend
        lines = "\n".join(f"  - {line}" for line in self.needed)
        super().__init__(f"no plan fits this hardware:\n{lines}\n  what would fit: {mend}")


class MachineFault(ForetuneError):
    """A fault of the machine, at a rank and a step."""

    exit_code = ExitCode.TRAINING_STOPPED

    def __init__(
        self, cause: str, *, rank: int | None = None, step: int | None = None, kind: str | None = None
    ) -> None:
        """`kind` is a `foretune.launch.failures.Cause`, where the rank knows which."""
        self.cause, self.rank, self.step, self.kind = cause, rank, step, kind
        where = "".join(
            [f" on rank {rank}" if rank is not None else "", f" at step {step}" if step is not None else ""]
        )
        super().__init__(f"{cause}{where}")


class TrainingStopped(MachineFault):
    """Training stopped and cannot go on by itself."""

    def __init__(
        self, cause: str, *, last_checkpoint: str | None, rank: int | None = None, step: int | None = None
    ) -> None:
        super().__init__(cause, rank=rank, step=step)
        self.last_checkpoint = last_checkpoint

    def __str__(self) -> str:
        last = self.last_checkpoint or "none was written yet"
        return f"training stopped: {super().__str__()}\n  last good checkpoint: {last}"


class VerificationFailed(ForetuneError):
    """An artifact failed its verification and was not put in place."""

    exit_code = ExitCode.OUR_BUG


class Preempted(ForetuneError):
    """Training was asked to stop, finished its step and saved."""

    exit_code = ExitCode.PREEMPTED

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"stopped as asked after step {step}; everything is saved")
