"""The weight under the mask of the gates: made when a layer needs it, instead of being kept."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bits import keep_two
from .group import join_group, reciprocal_root, round_to, split_group, square_root, widen
from .launch import BLOCK, NUM_WARPS, on_device, vector_width

PRIOR_FLOOR = tl.constexpr(1e-3)


@triton.jit
def columns(first, K, ROW_SPANS_TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Int32 [BLOCK], the column in its row of K of each element of the tile from `first` on."""
    column = (first % K).to(tl.int32) + tl.arange(0, BLOCK)
    if ROW_SPANS_TILE:
        column = tl.where(column < K, column, column - K)
    else:
        column %= K
    return tl.max_contiguous(tl.multiple_of(column, 4), 4)


@triton.jit
def gate_prior(w0, norm, BLOCK: tl.constexpr):
    """The prior of `reference.gate_prior`, of the four members of each group; fp32 [BLOCK/4]."""
    a, b, c, d = _relative(*split_group(tl.abs(w0) * norm, BLOCK))
    a, b = a * square_root(a), b * square_root(b)
    c, d = c * square_root(c), d * square_root(d)
    a, b, c, d = _relative(a, b, c, d)
    a, b = tl.maximum(a, PRIOR_FLOOR), tl.maximum(b, PRIOR_FLOOR)
    c, d = tl.maximum(c, PRIOR_FLOOR), tl.maximum(d, PRIOR_FLOOR)
    return a, b, c, d


@triton.jit
def _relative(a, b, c, d):
    """The members of groups over the RMS of their group."""
    # The floor under the mean square only keeps a group of zeros from dividing by zero.
    scale = reciprocal_root(tl.maximum(0.25 * (a * a + b * b + c * c + d * d), 1e-37))
    return a * scale, b * scale, c * scale, d * scale


@triton.jit
def keep_best(w0, s, a, b, c, d, BLOCK: tl.constexpr):
    """w0 at the two largest A*s of each group, +0.0 elsewhere; A is the prior (a, b, c, d)."""
    sa, sb, sc, sd = split_group(s, BLOCK)
    ka, kb, kc, kd = keep_two(a * sa, b * sb, c * sc, d * sd)
    wa, wb, wc, wd = split_group(w0, BLOCK)
    zero = tl.zeros_like(wa)
    wa, wb = tl.where(ka, wa, zero), tl.where(kb, wb, zero)
    wc, wd = tl.where(kc, wc, zero), tl.where(kd, wd, zero)
    return join_group(wa, wb, wc, wd, BLOCK)


@triton.jit
def _gate_project_kernel(
    s_ptr,
    w0_ptr,
    norm_ptr,
    out_ptr,
    n,
    K,
    ROW_SPANS_TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of BLOCK elements of one matrix a program; grid (tiles of N*K, matrices).

    out <- w0 at the two largest A*s of each group, +0.0 elsewhere. Only the order within a group
    counts, so s of 8 bits is used as its code.
    """
    first = tl.program_id(0).to(n.dtype) * BLOCK
    start = tl.program_id(1).to(tl.int64) * n + first
    offset = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), VECTOR), VECTOR)
    mask = tl.max_constancy(offset < tl.minimum(n - first, BLOCK).to(tl.int32), VECTOR)
    column = columns(first, K, ROW_SPANS_TILE, BLOCK)

    w0 = tl.load(w0_ptr + start + offset, mask, 0.0)
    s = widen(tl.load(s_ptr + start + offset, mask, 0))
    norm = widen(tl.load(norm_ptr + tl.program_id(1).to(tl.int64) * K + column))
    a, b, c, d = gate_prior(widen(w0), norm, BLOCK)
    kept = keep_best(w0, s, a, b, c, d, BLOCK)
    tl.store(out_ptr + start + offset, round_to(kept, out_ptr.dtype.element_ty), mask)


def gate_project_triton(s: Tensor, w0: Tensor, act_norm: Tensor, out: Tensor) -> None:
    """Write w0 at the two largest A*s of each group into out, +0.0 elsewhere.

    Args:
        s: [..., N, K] contiguous gates in [0, 1], float32, bfloat16 or float16; or uint8 codes.
        w0: [..., N, K] frozen weight; any of these float dtypes, as all below.
        act_norm: [..., K] norms behind the prior A.
        out: like w0, written.

    Cost: memory-bound: reads s and w0, writes out. No temporary memory. Deterministic.
    """
    if not s.numel():
        return
    n, k = s.shape[-2] * s.shape[-1], s.shape[-1]
    with on_device(s):
        _gate_project_kernel[(triton.cdiv(n, BLOCK), s.numel() // n)](
            s,
            w0,
            act_norm,
            out,
            n,
            k,
            k >= BLOCK,
            vector_width(n, w0, out),
            BLOCK,
            num_warps=NUM_WARPS,
        )
