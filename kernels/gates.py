"""What the kernels on gates share: the prior importance, and the mask that gates stand for."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import reciprocal_root, square_root
from .exact import keep_two
from .group import join_group, split_group

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
