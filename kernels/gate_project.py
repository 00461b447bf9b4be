"""The weight under the mask of the gates: made when a layer needs it, instead of being kept."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import round_to, widen
from .gates import columns, gate_prior, keep_best
from .launch import BLOCK, NUM_WARPS, on_device, vector_width


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
