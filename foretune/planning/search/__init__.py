"""The search: which layouts there are, which fit, which is fastest.

    stage × offload × optimizer's format × micro-batch × chunk of the loss × tiles × checkpointed layers × share
        ──memory──▶ those that fit ──time──▶ the fastest

`pins` refuses what cannot be, `space` says what is worth looking at, `candidates` gives figures and chooses.
"""

from foretune.planning.search.candidates import (
    EQUALLY_FAST,
    Candidate,
    best_of_families,
    evaluate,
    family_of,
    fastest,
    work_for,
)
from foretune.planning.search.pins import TILED_FAMILIES, refuse_impossible_pins
from foretune.planning.search.space import LOSS_CHUNKS, search_space

__all__ = [
    "EQUALLY_FAST",
    "LOSS_CHUNKS",
    "TILED_FAMILIES",
    "Candidate",
    "best_of_families",
    "evaluate",
    "family_of",
    "fastest",
    "refuse_impossible_pins",
    "search_space",
    "work_for",
]
