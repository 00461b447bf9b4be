"""Scalar instructions that Triton has no name for, and casts that its interpreter gets wrong."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter runs the same kernels with NumPy, but knows no inline assembly and rounds to
# bfloat16 by truncation, and gets its scalars as Python numbers; only the functions that ask for it
# here differ.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def scalar(x):
    """A scalar argument in fp32, given by value or as a pointer to it in device memory."""
    if INTERPRETED:
        return tl.full([], x, tl.float32)
    elif x.dtype.is_ptr():
        return tl.load(x).to(tl.float32)
    else:
        return x.to(tl.float32)


@triton.jit
def reciprocal(x):
    """1/x within 1 ulp, in one instruction; subnormals count as zero."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal_root(x):
    """1/sqrt(x) within 2 ulp, in one instruction, for normal x > 0."""
    if INTERPRETED:
        return 1.0 / tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def square_root(x):
    """sqrt(x) within 1 ulp, in one instruction; subnormals count as zero."""
    if INTERPRETED:
        return tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def widen(x):
    """Cast x to fp32. Each of the two bfloat16 in a register takes one instruction this way."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Cast x to `dtype`, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(x == x, nearest, x).to(dtype)
    else:
        return x.to(dtype)
