"""Numbers of 8 bits in blocks, and rounding by chance: their laws."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from foretune.engine.states.blocks import BLOCK, code, pack, round_by_chance, unpack

CPU = torch.device("cpu")


def blocks_of(low: float, high: float) -> st.SearchStrategy[np.ndarray]:
    """Two blocks over many magnitudes, subnormal numbers left out."""
    exponents = st.floats(-30, 30).map(lambda power: 10.0**power)
    elements = st.floats(low, high, width=32, allow_subnormal=False)
    array = arrays.arrays(np.float32, 2 * BLOCK, elements=elements)
    return st.tuples(array, exponents).map(lambda pair: (pair[0] * np.float32(pair[1])).astype(np.float32))


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_has_256_values_with_zero_and_one(signed: bool) -> None:
    values = code(CPU, signed=signed).values
    assert values.shape == (256,)
    assert (values.diff() > 0).all()
    assert 0.0 in values
    assert values[-1] == 1.0
    assert (values[0] < -0.99) if signed else (values[0] == 0)


@given(blocks_of(-1, 1))
def test_signed_values_come_back_within_half_a_step(values: np.ndarray) -> None:
    """Of the largest of the block 0.7 %; the values that come back stay what they are."""
    tensor, by = torch.from_numpy(values), code(CPU, signed=True)
    packed, scales = pack(tensor, by)
    back = unpack(packed, scales, by)
    assert ((back - tensor).abs().view(-1, BLOCK) <= 0.0071 * scales.abs()[:, None] + 1e-37).all()
    assert (back[tensor == 0] == 0).all()
    assert torch.equal(unpack(*pack(back, by), by), back)


@given(blocks_of(0, 1))
def test_what_has_no_sign_never_becomes_zero(values: np.ndarray) -> None:
    tensor, by = torch.from_numpy(values), code(CPU, signed=False)
    packed, scales = pack(tensor, by)
    back = unpack(packed, scales, by)
    assert ((back - tensor).abs().view(-1, BLOCK) <= 0.0036 * scales[:, None] + 1e-37).all()
    large = scales.repeat_interleave(BLOCK) > 1e-30  # else the smallest value is below fp32's
    assert ((back == 0) == (tensor == 0))[large].all()


def test_small_values_keep_their_magnitude() -> None:
    """A linear scale would make most of these zero: within a factor of 2 down to 1e-5 of the largest."""
    values = torch.ones(BLOCK)
    values[1:] = torch.logspace(-5, -1, BLOCK - 1)
    for signed in (True, False):
        by = code(CPU, signed=signed)
        ratio = unpack(*pack(values, by), by) / values
        assert ratio.min() > 0.5
        assert ratio.max() < 2.0


@given(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False))
def test_the_mean_of_all_roundings_is_the_value(value: float) -> None:
    noise = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    wide = torch.full((1 << 16,), value)
    rounded = round_by_chance(wide, noise)
    assert rounded.dtype == torch.bfloat16
    assert rounded.unique().numel() <= 2
    assert float(rounded.double().mean()) == pytest.approx(float(wide[0]), rel=1e-6, abs=1e-38)
    exact = wide.to(torch.bfloat16)[:1].float()
    if exact == wide[0]:  # what bf16 has stays
        assert (rounded.float() == exact).all()
