"""Packing a 2:4 tensor into values and 4-bit group codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exact import as_bits, magnitude
from .group import split_group
from .launch import BLOCK, NUM_WARPS, on_device


@triton.jit
def code_tile(n, K, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Where the elements of a tile of BLOCK/8 bytes of codes lie.

    A byte describes eight elements. With PADDED, rows of K = 4 (mod 8) elements end in half a byte,
    so the tile counts in rows of K + 4, of which the last four do not exist.

    Returns:
        base: int64 offset of the tile's first byte.
        offset: [BLOCK] offsets into the dense tensor.
        mask: [BLOCK] which of them exist.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    if PADDED:
        index = start + index
        row = index // (K + 4)
        offset = index - 4 * row
        mask = (offset < n) & (index - row * (K + 4) < K)
        offset = tl.max_contiguous(tl.multiple_of(offset, 4), 4)
        mask = tl.max_constancy(mask, 4)
    else:
        mask = tl.max_constancy(index < tl.minimum(n - start, BLOCK).to(tl.int32), 8)
        offset = start + tl.max_contiguous(tl.multiple_of(index, 8), 8)
    return start // 8, offset, mask


@triton.jit
def _pack_2to4_kernel(
    w_ptr, values_ptr, codes_ptr, n, num_bytes, K, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK elements -> BLOCK/2 values and BLOCK/8 bytes of codes a program."""
    base, offset, mask = code_tile(n, K, PADDED, BLOCK)
    w = tl.load(w_ptr + offset, mask, 0)
    a, b, c, d = split_group(w, BLOCK)
    # With at most two non-zeros no magnitudes need comparing. What is kept last is the last
    # non-zero, but b at least; what is kept first is another non-zero before it, or else a.
    _, nb, nc, nd = split_group(magnitude(w) != 0, BLOCK)
    from_c, from_b = nc & nd, nb & (nc | nd)
    first = tl.where(from_c, 2, tl.where(from_b, 1, 0))
    last = tl.where(nd, 3, tl.where(nc, 2, 1))
    values = tl.reshape(
        tl.join(tl.where(from_c, c, tl.where(from_b, b, a)), tl.where(nd, d, tl.where(nc, c, b))),
        [BLOCK // 2],
    )
    group, _, _, _ = split_group(offset, BLOCK)
    exists, _, _, _ = split_group(mask, BLOCK)
    pair = tl.reshape(tl.join(group // 2, group // 2 + 1), [BLOCK // 2])
    pair = tl.max_contiguous(tl.multiple_of(pair, 2 if PADDED else 4), 2 if PADDED else 4)
    pair_exists = tl.reshape(tl.join(exists, exists), [BLOCK // 2])
    tl.store(values_ptr + pair, values, tl.max_constancy(pair_exists, 2 if PADDED else 4))

    code = tl.where(exists, first | (last << 2), 0)
    low, high = tl.split(tl.reshape(code, [BLOCK // 8, 2]))
    position = base + tl.arange(0, BLOCK // 8)
    tl.store(codes_ptr + position, (low | (high << 4)).to(tl.uint8), position < num_bytes)


def pack_2to4_triton(w: Tensor) -> tuple[Tensor, Tensor]:
    """The two kept values of each group, and where they stood.

    Args:
        w: [..., K] contiguous, float32, bfloat16 or float16, K a multiple of 4; already 2:4 (not
            checked: of a group with more non-zeros some are lost).

    Returns:
        values: [..., K/2] of w's dtype, bitwise those of w, in order of position.
        codes: uint8 [..., ceil(K/8)]; a group's code is i | j << 2 for its kept positions i < j,
            the first group of a byte in its low half; rows with an odd number of groups end in
            zeros.

    Cost: memory-bound, 1.5 * element size + 1/8 bytes per element. Deterministic.
    """
    *lead, k = w.shape
    values = w.new_empty(*lead, k // 2)
    codes = w.new_empty(*lead, (k + 7) // 8, dtype=torch.uint8)
    if w.numel():
        with on_device(w):
            _pack_2to4_kernel[(triton.cdiv(codes.numel() * 8, BLOCK),)](
                as_bits(w),
                as_bits(values),
                codes,
                w.numel(),
                codes.numel(),
                k,
                k % 8 == 4,
                BLOCK,
                num_warps=NUM_WARPS,
            )
    return values, codes
