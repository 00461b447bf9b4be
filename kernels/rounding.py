"""Stochastic rounding, to 16-bit floats and to 8-bit codes in blocks of 256 with one scale each.

Rounding to nearest would freeze what an optimiser step changes by less than half a spacing;
rounding up or down with the right probabilities keeps the expectation.
"""

from __future__ import annotations

import triton
import triton.language as tl

QUANTUM_BLOCK = tl.constexpr(256)


@triton.jit
def random_bits(seed, step, start, BLOCK: tl.constexpr):
    """Uint32 [BLOCK], random bits for the elements of a tile: Philox of (seed, step, position)."""
    group = start // 4 + tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.philox(
        seed, group.to(tl.uint32), (group >> 32).to(tl.uint32), step.to(tl.uint32), 0
    )
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])


@triton.jit
def round_stochastic(x, random, dtype: tl.constexpr):
    """Round up or down, with the probabilities that make x the expected value.

    Args:
        x: fp32.
        random: uint32 of the same shape, uniform.
        dtype: bfloat16 or float16.
    """
    # The spacing of `dtype` at x, from its exponent; below the normal range the spacing is
    # constant. bfloat16's exponents end where fp32's do: its spacing is held at 2^-107 to stay
    # normal here.
    fraction: tl.constexpr = 10 if dtype == tl.float16 else 7
    smallest: tl.constexpr = 127 - 14 if dtype == tl.float16 else 127 - 100
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, smallest) - fraction
    spacing = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    uniform = (random >> 8).to(tl.int32).to(tl.float32) * 2.0**-24
    return (tl.floor(x * inverse + uniform) * spacing).to(dtype)


@triton.jit
def uniform(bits, FIELD: tl.constexpr):
    """Numbers in (0, 1) from one of the three 10-bit fields of random bits."""
    return (((bits >> (10 * FIELD)) & 1023).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 1024)


@triton.jit
def dequantize(codes, scale, BLOCK: tl.constexpr):
    """Codes [BLOCK] times the scale [BLOCK/256] of their block; fp32 [BLOCK]."""
    blocks = tl.reshape(codes.to(tl.float32), [BLOCK // QUANTUM_BLOCK, QUANTUM_BLOCK])
    return tl.reshape(blocks * scale[:, None], [BLOCK])


@triton.jit
def quantize(x, random, top: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `dequantize`, with the largest magnitude of a block at code `top`.

    Returns:
        codes: fp32 [BLOCK] of whole numbers; their expectation times the scale is x.
        scale: fp32 [BLOCK/256].
    """
    blocks = tl.reshape(x, [BLOCK // QUANTUM_BLOCK, QUANTUM_BLOCK])
    scale = tl.max(tl.abs(blocks), 1) * (1.0 / top)
    inverse = tl.where(scale > 0, 1.0 / scale, 0.0)
    codes = tl.floor(blocks * inverse[:, None] + tl.reshape(random, blocks.shape))
    # x/scale can exceed `top` by rounding.
    codes = tl.minimum(tl.maximum(codes, -top), top)
    return tl.reshape(codes, [BLOCK]), scale
