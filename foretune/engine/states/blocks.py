"""Numbers of 8 bits in blocks that share a scale, and fp32 rounded to bf16 by chance: what 8-bit Adam is made of.

    fp32 [n] ──largest of each 256──▶ scales fp32 [n / 256]
             ──divided by it, nearest of 256 codes──▶ uint8 [n]

Codes: the dynamic data type of Dettmers et al. 2022 ("8-bit Optimizers via Block-wise Quantization", §2.2 and §3): the
number of leading zeros is a decimal exponent, what is left of the byte a linear fraction, so 1e-7 and 1 of the same
block are both told apart from 0. Plain tensor operations: they run on any device, and a compiler fuses them.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

#: Elements that share a scale.
BLOCK = 256
#: Decimal exponents of the codes: the smallest values are near 10⁻⁷ of a block's largest.
_EXPONENTS = 7
#: The smallest normal number of fp32: below it values are as good as 0, and nothing is divided by them.
_TINY = 2.0**-126


class Code(NamedTuple):
    """What the 256 values of a byte stand for.

    Attributes:
        values: fp32 [256], ascending, in [-1, 1] or [0, 1].
        edges: fp32 [255]: between them, where the nearest value changes.
    """

    values: torch.Tensor
    edges: torch.Tensor


@cache
def code(device: torch.device, *, signed: bool) -> Code:
    """The code for values of both signs, or for those that have none.

    Without a sign are second moments, of which Adam divides by the root: a small one that became 0 would make a huge
    step of a small one. So one that is not zero is never rounded to zero, but up to the smallest value.
    """
    positive = []
    for exponent in range(_EXPONENTS):
        count = 2 ** (exponent + (0 if signed else 1))
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent + 1 - _EXPONENTS))
    one_sign = torch.cat([*positive, torch.tensor([0.0, 1.0], dtype=torch.float64)])
    both = torch.cat([-torch.cat(positive), one_sign])
    values = (both if signed else one_sign).sort().values
    edges = (values[:-1] + values[1:]) / 2
    if not signed:
        edges[0] = 0.0
    return Code(values.float().to(device), edges.float().to(device))


def pack(values: torch.Tensor, by: Code) -> tuple[torch.Tensor, torch.Tensor]:
    """Round fp32 values [n], n a multiple of `BLOCK`, to (uint8 [n], scales fp32 [n / `BLOCK`]).

    A scale has the sign of its block's largest value, which is 1 then: there is no -1 in the code, and a value that is
    packed again and again must not shrink.
    """
    blocks = values.view(-1, BLOCK)
    high, low = blocks.amax(dim=1), blocks.amin(dim=1)
    scales = torch.where(high >= -low, high, low)
    parts = blocks / torch.where(scales.abs() < _TINY, 1.0, scales)[:, None]
    return torch.bucketize(parts, by.edges, out_int32=True).to(torch.uint8).view(-1), scales


def unpack(packed: torch.Tensor, scales: torch.Tensor, by: Code) -> torch.Tensor:
    """What `pack` gave, as fp32 [n]."""
    return (by.values[packed.int()].view(-1, BLOCK) * scales[:, None]).view(-1)


def round_by_chance(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """fp32 values [n] as bf16: up or down, with the chances that make the mean right.

    Args:
        noise: int16 [n], uniform over all its values.

    Nearest rounding drops every change below half a unit in the last place, 2⁻⁹ of a weight, which most steps of a
    fine-tuning are (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", §3.1; Zamirai et al. 2020).
    """
    bits = values.view(torch.int32) + (noise.int() & 0xFFFF)
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)
