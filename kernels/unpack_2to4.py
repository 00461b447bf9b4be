"""Unpacking values and 4-bit group codes into the dense tensor."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .exact import as_bits
from .group import join_group, split_group
from .launch import BLOCK, NUM_WARPS, on_device
from .pack_2to4 import code_tile


@triton.jit
def _load_from_tiles(codes_ptr, base, n, K, BLOCK: tl.constexpr):
    """The codes of the BLOCK/4 groups that start with byte `base` of the rows, out of tiles.

    See `reference.tile_codes`: 64 rows and 8 groups make a tile of 256 bytes.
    """
    index = base * 2 + tl.arange(0, BLOCK // 4)
    row, group = index // (K // 4), index % (K // 4)
    tile = (row // 64) * (K // 32) + group // 8
    byte = row % 64 // 16 * 64 + row % 8 * 8 + group % 4 * 2 + group % 8 // 4
    code = tl.load(codes_ptr + tile * 256 + byte, index < n // 4, 0).to(tl.int32)
    return code >> (row % 16 // 8 * 4).to(tl.int32) & 15


@triton.jit
def _unpack_2to4_kernel(
    values_ptr,
    codes_ptr,
    out_ptr,
    n,
    num_bytes,
    K,
    PADDED: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK/2 values and BLOCK/8 bytes of codes -> BLOCK elements a program."""
    base, offset, mask = code_tile(n, K, PADDED, BLOCK)
    if TILED:
        code = _load_from_tiles(codes_ptr, base, n, K, BLOCK)
    else:
        position = base + tl.arange(0, BLOCK // 8)
        code = tl.load(codes_ptr + position, position < num_bytes, 0).to(tl.int32)
        code = tl.reshape(tl.join(code & 15, code >> 4), [BLOCK // 4])
    first, last = code & 3, code >> 2

    group, _, _, _ = split_group(offset, BLOCK)
    exists, _, _, _ = split_group(mask, BLOCK)
    pair = tl.reshape(tl.join(group // 2, group // 2 + 1), [BLOCK // 2])
    pair = tl.max_contiguous(tl.multiple_of(pair, 2 if PADDED else 4), 2 if PADDED else 4)
    pair_exists = tl.reshape(tl.join(exists, exists), [BLOCK // 2])
    pair_exists = tl.max_constancy(pair_exists, 2 if PADDED else 4)
    values = tl.load(values_ptr + pair, pair_exists, 0)
    x, y = tl.split(tl.reshape(values, [BLOCK // 4, 2]))
    zero = tl.zeros_like(x)
    dense = join_group(
        tl.where(first == 0, x, zero),
        tl.where(first == 1, x, tl.where(last == 1, y, zero)),
        tl.where(first == 2, x, tl.where(last == 2, y, zero)),
        tl.where(last == 3, y, zero),
        BLOCK,
    )
    tl.store(out_ptr + offset, dense, mask)


def unpack_2to4_triton(values: Tensor, codes: Tensor) -> Tensor:
    """The dense tensor behind `pack_2to4_triton`'s output, exact +0.0 where nothing was kept.

    Args:
        values: [..., K/2] contiguous, of 8, 16 or 32 bits.
        codes: uint8 [..., ceil(K/8)], contiguous; or, of a weight [N, K] of 16 or 32 bits, in
            tiles.

    Returns:
        [..., K] of the values' dtype.

    Cost: memory-bound, 1.5 * element size + 1/8 bytes per element. Deterministic.
    """
    k = 2 * values.shape[-1]
    out = values.new_empty(*values.shape[:-1], k)
    if out.numel():
        with on_device(values):
            is_tiled = codes.dim() == 3 and values.dim() == 2
            # With a last half byte a row counts as four elements more, see `code_tile`.
            count = out.numel() if is_tiled else codes.numel() * 8
            _unpack_2to4_kernel[(triton.cdiv(count, BLOCK),)](
                as_bits(values),
                codes,
                as_bits(out),
                out.numel(),
                codes.numel(),
                k,
                k % 8 == 4,
                is_tiled,
                BLOCK,
                num_warps=NUM_WARPS,
            )
    return out
