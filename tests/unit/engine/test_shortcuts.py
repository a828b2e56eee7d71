"""The shortcuts through DeepSpeed's step change what it costs, not what it does."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def cases(result_of: Callable[..., Any]) -> dict[str, dict]:
    return {case["case"]: case for case in result_of("step_costs.py")}


def test_same_updates_and_norms(cases: dict[str, dict]) -> None:
    """Master weights and norms to 1e-6."""
    assert len(cases) == 6
    for name, case in cases.items():
        plain, short = case["plain"], case["short"]
        finite = [i for i, applied in enumerate(plain["applied"]) if applied]
        for step in finite:
            assert float(short["norms"][step]) == pytest.approx(float(plain["norms"][step]), rel=1e-6), name
        np.testing.assert_allclose(short["weights"], plain["weights"], atol=1e-6, err_msg=name)


def test_a_gradient_that_is_not_finite_is_still_skipped(cases: dict[str, dict]) -> None:
    for name, case in cases.items():
        assert case["short"]["applied"] == case["plain"]["applied"] == [True, True, False, True], name


def test_the_host_reads_two_values_a_step(cases: dict[str, dict]) -> None:
    """Whether the norm is finite, and the norm for the journal; ZeRO-1 with fp32 sums reads both at once."""
    for name, case in cases.items():
        if "sgd" in name:
            continue  # it has no kernel that clips: DeepSpeed does, and asks whether it has to
        most = 1 if "zero1 bf16" in name else 2
        assert max(case["short"]["reads"]) <= most, (name, case["short"]["reads"], case["plain"]["reads"])


def test_a_step_from_flat_sums_asks_for_as_much_whatever_the_number_of_parameters(cases: dict[str, dict]) -> None:
    """ZeRO-1 with fp32 sums, two groups of parameters: nothing is done parameter by parameter."""
    assert max(cases["zero1 bf16 adamw clip 1.0"]["short"]["operations"]) <= 60
