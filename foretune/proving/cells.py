"""The matrix: which fault, in which phase, at which layout, and what must come of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from foretune.faults import ALL_RANKS, SUPERVISOR, Point

FaultName = Literal[
    "kill",  # a rank, by itself, at a point
    "kill_from_outside",  # a rank, by another process, at a random moment within a phase
    "kill_supervisor",
    "stop",  # SIGSTOP: a hang
    "terminate",  # SIGTERM to the supervisor: a preemption
    "flip_bit",  # in the newest checkpoint, then the ranks are killed
    "truncate",
    "delete_manifest",
    "remove_newest",
    "no_space",
    "nan",
    "spike",
    "loader_error",
    "out_of_memory",
]
Expectation = Literal["equal", "equal_to_reference_without_that_window", "within_tolerance"]

#: Steps of a proof's run, and of its checkpoints. Faults come after the second checkpoint.
STEPS = 14
EVERY = 4
FAULT_STEP = 10

#: Faults that no rank is the victim of.
_OF_THE_RUN = ("kill_supervisor", "terminate")


@dataclass(frozen=True)
class Layout:
    """How the reference trains. `offload` is of the optimizer; `lora` trains adapters; `eight_bits`: Adam's moments.
    `ranks`: 0 is as many as the proof has.

    Dropout is on where equality is to the bit, so that a random state that was not restored shows. Another micro-batch
    draws other masks: where that is the recovery, dropout is off.
    """

    stage: int
    offload: bool = False
    lora: bool = False
    eight_bits: bool = False
    ranks: int = 0
    dropout: bool = True

    @property
    def name(self) -> str:
        return (
            (f"{self.ranks} rank{'s' if self.ranks > 1 else ''} at " if self.ranks else "")
            + f"ZeRO-{self.stage}"
            + (" offload" if self.offload else "")
            + (" LoRA" if self.lora else "")
            + (" 8-bit" if self.eight_bits else "")
            + ("" if self.dropout else " no dropout")
        )


@dataclass(frozen=True)
class Cell:
    """One fault in one phase at one layout. `seed` decides the moment where that is random.

    `then`: the layout that goes on after a preemption, if it is another.
    """

    fault: FaultName
    phase: Point
    layout: Layout
    rank: int = 0
    step: int = FAULT_STEP
    expects: Expectation = "equal"
    seed: int = 0
    then: Layout | None = None

    @property
    def name(self) -> str:
        victim = f" rank {self.rank}" if self.rank >= 0 and self.fault not in _OF_THE_RUN else ""
        after = "" if self.then is None else f", then {self.then.name}"
        return f"{self.layout.name}: {self.fault}{victim} in {self.phase}{after}"


_WINDOW: Expectation = "equal_to_reference_without_that_window"
#: A save follows step 12's end; 12 steps are done by then.
_SAVE_STEP = 12


def _kills(layout: Layout) -> list[Cell]:
    points: tuple[Point, ...] = ("data", "forward", "backward", "reduction", "step")
    saves: tuple[Point, ...] = ("save", "saved")
    outside: tuple[Point, ...] = ("data", "forward", "backward", "step")
    return [
        *(Cell("kill", point, layout, rank=number % 2) for number, point in enumerate(points)),
        *(Cell("kill", point, layout, rank=number % 2, step=_SAVE_STEP) for number, point in enumerate(saves)),
        *(
            Cell("kill_from_outside", point, layout, rank=(number + seed) % 2, seed=seed)
            for seed in (1, 2)
            for number, point in enumerate(outside)
        ),
        Cell("kill_from_outside", "save", layout, rank=0, step=_SAVE_STEP, seed=3),
        Cell("kill_from_outside", "save", layout, rank=1, step=_SAVE_STEP, seed=4),
    ]


def _others(layout: Layout) -> list[Cell]:
    return [
        Cell("stop", "forward", layout, rank=1),
        Cell("stop", "step", layout, rank=0),
        Cell("terminate", "forward", layout),
        Cell("terminate", "save", layout, step=_SAVE_STEP),
        Cell("flip_bit", "data", layout),
        Cell("truncate", "data", layout),
        Cell("delete_manifest", "data", layout),
        Cell("remove_newest", "data", layout),
        Cell("no_space", "commit", layout, step=8, rank=SUPERVISOR),
        Cell("nan", "backward", layout, expects=_WINDOW),
        Cell("spike", "forward", layout, rank=ALL_RANKS, expects=_WINDOW),
        Cell("loader_error", "data", layout, rank=1),
        Cell("out_of_memory", "forward", replace(layout, dropout=False), expects="within_tolerance"),
    ]


def _of_supervisor(layout: Layout) -> list[Cell]:
    return [
        Cell("kill_supervisor", "forward", layout),
        Cell("kill_supervisor", "commit", layout, step=_SAVE_STEP, rank=SUPERVISOR),
        Cell("kill_supervisor", "clean", layout, step=_SAVE_STEP, rank=SUPERVISOR),
    ]


def _relaid(stage: int, then: Layout) -> Cell:
    """Preempted, and gone on with by other ranks at another stage. Their masks would be others: without dropout."""
    layout, then = Layout(stage, dropout=False), replace(then, dropout=False)
    return Cell("terminate", "forward", layout, expects="within_tolerance", then=then)


def small_matrix() -> list[Cell]:
    """At least one cell of every fault, every phase and every stage: what every test run goes through."""
    two, three = Layout(2), Layout(3)
    cells = [
        *(cell for cell in _kills(two) if cell.seed not in (2, 4)),
        *(cell for cell in _others(two) if (cell.fault, cell.phase) not in (("stop", "step"), ("terminate", "save"))),
        Cell("kill_supervisor", "clean", two, step=_SAVE_STEP, rank=SUPERVISOR),
        Cell("kill", "reduction", three, rank=1),
        Cell("kill_from_outside", "backward", three, rank=0, seed=5),
        Cell("kill", "step", Layout(0), rank=0),
        Cell("kill_from_outside", "forward", Layout(1), rank=1, seed=6),
        Cell("kill", "backward", replace(three, lora=True), rank=1),
        Cell("kill", "step", replace(two, offload=True), rank=0),
        Cell("kill", "step", Layout(1, eight_bits=True), rank=1),
        _relaid(2, Layout(3, ranks=1)),
    ]
    # The same layout in a row: its reference and its warm processes are used again.
    return sorted(cells, key=lambda cell: cell.layout.name)


def full_matrix() -> list[Cell]:
    """Every fault and phase at every stage, and the kills again with offload, LoRA and 8-bit moments."""
    cells: list[Cell] = []
    for stage in range(4):
        layout = Layout(stage)
        cells += [*_kills(layout), *_others(layout), *_of_supervisor(layout)]
    adapted, eight_bits = (Layout(2, lora=True), Layout(3, lora=True)), Layout(1, eight_bits=True)
    for layout in (Layout(2, offload=True), Layout(3, offload=True), *adapted, eight_bits):
        cells += _kills(layout)
    for stage, ranks, then in ((0, 1, 3), (1, 3, 2), (2, 1, 3), (2, 3, 2), (3, 3, 1), (3, 1, 0)):
        cells.append(_relaid(stage, Layout(then, ranks=ranks)))
    return cells
