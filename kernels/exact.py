"""Groups as bit patterns, for the ops that move entries without changing them.

The order of the magnitudes of floats is the order of their bits without the sign, so these kernels
never convert: what is kept is bitwise the original, NaN included (it counts as the largest), and
one kernel serves both 16-bit formats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def as_bits(x: Tensor) -> Tensor:
    """The bits of x as signed integers of its size, without a copy."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.element_size()])


@triton.jit
def magnitude(bits):
    """Signed integers in the order of the floats' magnitudes."""
    return bits & (0x7FFF if bits.dtype == tl.int16 else 0x7FFFFFFF)


@triton.jit
def keep_two(a, b, c, d):
    """Which two of four magnitudes are the largest, as booleans; ties keep the lower index."""
    ab, ac, ad, bc, bd, cd = b > a, c > a, d > a, c > b, d > b, d > c
    return (
        ~_majority(ab, ac, ad),
        ~_majority(~ab, bc, bd),
        ~_majority(~ac, ~bc, cd),
        ~_majority(~ad, ~bd, ~cd),
    )


@triton.jit
def _majority(x, y, z):
    return (x & y) | (z & (x | y))
