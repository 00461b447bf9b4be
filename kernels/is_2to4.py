"""The 2:4 check: one read of the tensor, one byte out, no host synchronisation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exact import as_bits, magnitude
from .group import split_group
from .launch import BLOCK, NUM_WARPS, on_device, vector_width


@triton.jit
def _is_2to4_kernel(w_ptr, result_ptr, n, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Writes 0 to the result if a group of the tile has more than two non-zeros.

    Programs that write at all write the same value, so their order does not matter.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), VECTOR), VECTOR)
    mask = tl.max_constancy(offset < tl.minimum(n - start, BLOCK).to(tl.int32), VECTOR)
    w = tl.load(w_ptr + start + offset, mask, 0)
    a, b, c, d = split_group((magnitude(w) != 0).to(tl.int32), BLOCK)
    most = tl.max(a + b + c + d, 0)
    tl.store(result_ptr, 0, most > 2)


def is_2to4_triton(w: Tensor) -> Tensor:
    """Whether every group of four has at most two non-zeros (NaN counts as non-zero).

    Args:
        w: [..., K] contiguous, float32, bfloat16 or float16, K a multiple of 4.

    Returns:
        A 0-d bool tensor on w's device.

    Cost: memory-bound, element size per element. Deterministic.
    """
    result = torch.ones((), dtype=torch.bool, device=w.device)
    n = w.numel()
    if n:
        with on_device(w):
            _is_2to4_kernel[(triton.cdiv(n, BLOCK),)](
                as_bits(w),
                result.view(torch.uint8),
                n,
                vector_width(n, w),
                BLOCK,
                num_warps=NUM_WARPS,
            )
    return result
