"""The bootstrap against what statistics says of simple cases."""

from __future__ import annotations

import numpy as np
import pytest

from foretune.evaluation.bootstrap import interval, resampled_means


def test_interval_of_a_mean_is_the_normal_one() -> None:
    """For a plain mean of many values the bootstrap gives mean ± 1.96 standard errors."""
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = interval(resampled_means(values[None], np.ones(400))[0])
    error = values.std(ddof=1) / np.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


def test_interval_covers_the_truth_nineteen_times_in_twenty() -> None:
    random = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        lengths = random.integers(5, 60, size=60).astype(np.float64)
        sums = lengths * 1.5 + random.normal(0, 8.0, size=60)  # true ratio 1.5
        low, high = interval(resampled_means(sums[None], lengths, resamples=400, seed=trial)[0])
        covered += low <= 1.5 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    """Documents differ much more than the models do: unpaired, the difference would drown."""
    random = np.random.default_rng(3)
    weights = np.full(100, 20.0)
    base = random.normal(60, 20, size=100)
    tuned = base - 1.0 + random.normal(0, 0.5, size=100)
    means = resampled_means(np.stack([tuned, base]), weights)
    low, high = interval(means[0] - means[1])
    assert high < 0
    unpaired = resampled_means(base[None], weights, seed=5)[0]
    assert high - low < 0.1 * (interval(means[0] - unpaired)[1] - interval(means[0] - unpaired)[0])


def test_every_draw_weighs_documents_by_their_targets() -> None:
    """Equal loss per token everywhere: whatever is drawn, the mean is that loss."""
    weights = np.array([1.0, 500.0, 7.0])
    means = resampled_means((2.5 * weights)[None], weights)
    assert means.shape == (1, 2000)
    assert np.allclose(means, 2.5)


def test_the_same_data_give_the_same_interval() -> None:
    values = np.random.default_rng(4).normal(size=(2, 30))
    assert np.array_equal(resampled_means(values, np.ones(30)), resampled_means(values, np.ones(30)))
