"""The 2:4 mask of a score: one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exact import as_bits, keep_two, magnitude
from .group import join_group, split_group
from .launch import BLOCK, NUM_WARPS, on_device, vector_width


@triton.jit
def _mask_2to4_kernel(score_ptr, out_ptr, n, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """out[tile] = 1 at the two largest magnitudes of each group, else 0."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), VECTOR), VECTOR)
    mask = tl.max_constancy(offset < tl.minimum(n - start, BLOCK).to(tl.int32), VECTOR)
    score = tl.load(score_ptr + start + offset, mask, 0)
    a, b, c, d = split_group(magnitude(score), BLOCK)
    a, b, c, d = keep_two(a, b, c, d)
    kept = join_group(a.to(tl.uint8), b.to(tl.uint8), c.to(tl.uint8), d.to(tl.uint8), BLOCK)
    tl.store(out_ptr + start + offset, kept, mask)


def mask_2to4_triton(score: Tensor) -> Tensor:
    """True at the two entries of largest |score| in each group of four; ties keep the lower index.

    Args:
        score: [..., K] contiguous, float32, bfloat16 or float16, K a multiple of 4.

    Returns:
        bool [..., K] with exactly two True per group.

    Cost: memory-bound, element size + 1 bytes per element. Deterministic.
    """
    out = torch.empty_like(score, dtype=torch.bool)
    n = score.numel()
    if n:
        with on_device(score):
            _mask_2to4_kernel[(triton.cdiv(n, BLOCK),)](
                as_bits(score),
                out.view(torch.uint8),
                n,
                vector_width(n, score),
                BLOCK,
                num_warps=NUM_WARPS,
            )
    return out
