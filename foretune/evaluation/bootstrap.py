"""How sure a mean over documents is: the paired bootstrap (Efron and Tibshirani 1993, chapters 6 and 13; Koehn 2004).

    per document: Σ nll of each model, number of targets ──draw documents with replacement, 2000 times──▶
    mean = Σ nll / Σ targets of each draw ──2.5 % and 97.5 % quantiles──▶ interval

Documents are drawn and not tokens: tokens of one document are not independent. All models see the same draws, so the
interval of a difference is as narrow as the pairing allows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
#: Draws made at once: bounds memory at 200 x documents x 8 bytes.
_DRAWS = 200

Floats = np.ndarray[Any, np.dtype[np.float64]]


def resampled_means(sums: Floats, weights: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Ratios of sums under resampling of documents.

    Args:
        sums: float64 [M, D], of each of M models and D documents.
        weights: [D], positive: what the ratio divides by (targets, or ones).

    Returns:
        float64 [M, resamples]; the columns of all rows are of the same draw.
    """
    documents = len(weights)
    assert documents > 0, "a mean of nothing"
    generator = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, _DRAWS):
        draws = min(_DRAWS, resamples - start)
        counts = generator.multinomial(documents, np.full(documents, 1 / documents), size=draws).astype(np.float64)
        parts.append((sums @ counts.T) / (counts @ weights))
    return np.concatenate(parts, axis=1)


def interval(means: Floats, *, level: float = LEVEL) -> tuple[float, float]:
    """The central interval that holds `level` of the resampled means."""
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
