"""What came of each cell, and of all of them."""

from __future__ import annotations

from typing import ClassVar

from foretune.artifacts import Artifact


class CellResult(Artifact):
    """One cell, as it went.

    Attributes:
        recovered: training reached its last step.
        steps_lost: steps that had to be done again.
        seconds_lost: from the fault to the next step that was finished.
        hash_equal: weights, optimizer states, random states and loss log equal the reference's (of its expectation).
        difference: norm of the difference of the weights over the norm of the update, where equality is not expected.
        traceback: where the victim was, as it said itself.
        passed: recovered, and as expected.
    """

    name: str
    fault: str
    phase: str
    stage: int
    layout: str
    expects: str
    recovered: bool
    steps_lost: int
    seconds_lost: float | None
    hash_equal: bool
    difference: float | None
    exit_code: int
    causes: list[str]
    traceback: str
    passed: bool
    problem: str | None
    seconds: float


class Verdict(Artifact):
    """The matrix. `file_name` is written into the folder of the proof."""

    file_name: ClassVar[str] = "prove.json"
    date: str
    versions: dict[str, str]
    machine: str
    model: str
    world_size: int
    seed: int
    cells: list[CellResult]
    left_out: tuple[str, ...] = ()  # cells whose layout can't be planned for this model on this machine, and why
    passed: bool
    seconds: float


class SoakVerdict(Artifact):
    """Random kills for some minutes.

    Attributes:
        kills: SIGKILLs that hit a living rank.
        runs: trainings that were finished meanwhile; `wrong`: those that did not end in the reference's bits.
        goodput: time of steps that counted (`useful_seconds`) over the wall time of the trainings.
        seconds_lost: the rest, by cause (`foretune.reporting.goodput`).
    """

    file_name: ClassVar[str] = "soak.json"
    date: str
    versions: dict[str, str]
    machine: str
    seed: int
    kills: int
    runs: int
    wrong: int
    goodput: float
    useful_seconds: float
    seconds_lost: dict[str, float]
    seconds: float
    passed: bool
