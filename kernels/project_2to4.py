"""The 2:4 projection: one pass, all but the two best entries of each group become +0.0."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exact import as_bits, keep_two, magnitude
from .group import join_group, split_group
from .launch import BLOCK, NUM_WARPS, on_device, vector_width


@triton.jit
def _project_2to4_kernel(w_ptr, score_ptr, out_ptr, n, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """out[tile] = w[tile] where the score (w itself if None) is among the group's two largest."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), VECTOR), VECTOR)
    mask = tl.max_constancy(offset < tl.minimum(n - start, BLOCK).to(tl.int32), VECTOR)
    w = tl.load(w_ptr + start + offset, mask, 0)
    score = w if score_ptr is None else tl.load(score_ptr + start + offset, mask, 0)
    sa, sb, sc, sd = split_group(magnitude(score), BLOCK)
    ka, kb, kc, kd = keep_two(sa, sb, sc, sd)
    a, b, c, d = split_group(w, BLOCK)
    kept = join_group(
        tl.where(ka, a, 0), tl.where(kb, b, 0), tl.where(kc, c, 0), tl.where(kd, d, 0), BLOCK
    )
    tl.store(out_ptr + start + offset, kept, mask)


def project_2to4_triton(w: Tensor, score: Tensor | None = None) -> Tensor:
    """Set all but the two best entries of each group to exact +0.0.

    Args:
        w: [..., K] contiguous, float32, bfloat16 or float16, K a multiple of 4.
        score: [..., K] importance, any of these dtypes; None means |w|.

    Returns:
        A new tensor like w; kept entries are bitwise those of w. Ties keep the lower index.

    Cost: memory-bound, 2 * element size per element (and the score's). Deterministic.
    """
    out = torch.empty_like(w)
    n = w.numel()
    if n:
        bits = None if score is None else as_bits(score)
        with on_device(w):
            _project_2to4_kernel[(triton.cdiv(n, BLOCK),)](
                as_bits(w),
                bits,
                as_bits(out),
                n,
                vector_width(n, w, score),
                BLOCK,
                num_warps=NUM_WARPS,
            )
    return out
