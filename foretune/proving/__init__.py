"""Breaks whole runs on purpose and shows what came of it: the proof that recovery recovers.

reference run ──┐
same run, broken as a `Cell` says ──▶ digests of weights, optimizer states, random states, losses ──compare──▶ matrix
"""

from foretune.proving.cells import EVERY, STEPS, full_matrix, small_matrix
from foretune.proving.prove import prove
from foretune.proving.soak import soak
from foretune.proving.verdict import Verdict

__all__ = ["EVERY", "STEPS", "Verdict", "full_matrix", "prove", "small_matrix", "soak"]
