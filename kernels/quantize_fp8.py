"""Rows as e4m3 numbers and a scale each, in one pass: a program holds a whole row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import ALL, widen
from .launch import on_device

_MOST_WARPS = 16
_ELEMENTS = 16  # of a thread, where a row is short enough


@triton.jit
def _to_e4m3(x):
    """The codes of fp32 numbers of at most 448, rounded to nearest even; what becomes 0 is +0."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers lose 20 bits of their fraction, and the exponent's bias goes from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 they are multiples of 2^-9: adding 2^14 rounds to those, in the last bits.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    small = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)  # NaN
    return tl.where(code == 0, 0, code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _quantize_fp8_kernel(w_ptr, scale_in_ptr, values_ptr, scale_ptr, K, BLOCK: tl.constexpr):
    """One row of K elements a program; its scale is found, unless it is given."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    mask = offset < K
    x = widen(tl.load(w_ptr + row * K + offset, mask, 0))
    if scale_in_ptr is None:
        largest = tl.reduce(tl.abs(x), 0, _larger)
        scale = tl.maximum(tl.math.div_rn(largest, 448.0), 2.0**-126, propagate_nan=ALL)
        scale = tl.where(largest == 0, 1.0, scale)
    else:
        scale = tl.load(scale_in_ptr + row)
    ratio = tl.math.div_rn(x, tl.zeros_like(x) + scale)
    ratio = tl.minimum(tl.maximum(ratio, -448.0, propagate_nan=ALL), 448.0, propagate_nan=ALL)
    tl.store(values_ptr + row * K + offset, _to_e4m3(ratio), mask)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=ALL)


def quantize_fp8_triton(w: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each row as e4m3 values and one scale, rounded to nearest even.

    Args:
        w: [..., K] contiguous, float32, bfloat16 or float16.
        scale: float32 [...], contiguous, or None: the largest magnitude of the row over 448.

    Returns:
        values: float8_e4m3fn [..., K], +0 where they round to zero.
        scale: float32 [...].

    Cost: memory-bound: element size and 1 byte per element. Deterministic; bitwise the reference.
    """
    k = w.shape[-1]
    values = w.new_empty(w.shape, dtype=torch.uint8)
    found = w.new_empty(w.shape[:-1], dtype=torch.float32)
    if w.numel():
        block = max(triton.next_power_of_2(k), 32)
        num_warps = min(max(block // (32 * _ELEMENTS), 1), _MOST_WARPS)
        with on_device(w):
            _quantize_fp8_kernel[(found.numel(),)](
                w, scale, values, found, k, block, num_warps=num_warps
            )
    elif scale is None:
        found.fill_(1.0)  # rows without elements
    else:
        found.copy_(scale)
    return values.view(torch.float8_e4m3fn), found
