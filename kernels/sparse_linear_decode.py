"""The product with a packed 2:4 weight for few tokens, where the CUDA kernel was not compiled.

Triton has no sparse tensor core instruction, so a tile of weight is unpacked in registers and
multiplied as a dense one: what is saved is memory traffic. For one token the kept weights meet the
entries of x they belong to without any matrix product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, round_to
from .launch import on_device

BLOCK_N, BLOCK_K, NUM_WARPS = 16, 256, 4
MAX_TOKENS = 64


@triton.jit
def _load_packed(
    values_ptr, codes_ptr, row, start, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The kept values x, y of each group and their places; [BLOCK_N, BLOCK_K/4] each.

    Groups past the end of a row hold zeros at places 0 and 0.
    """
    byte = start // 8 + tl.arange(0, BLOCK_K // 8)
    exists = (row[:, None] < N) & (byte[None, :] < K // 8)
    code = tl.load(codes_ptr + row[:, None].to(tl.int64) * (K // 8) + byte[None, :], exists, 0)
    code = code.to(tl.int32)
    code = tl.reshape(tl.join(code & 15, code >> 4), [BLOCK_N, BLOCK_K // 4])
    column = start // 2 + tl.arange(0, BLOCK_K // 2)
    exists = (row[:, None] < N) & (column[None, :] < K // 2)
    values = tl.load(
        values_ptr + row[:, None].to(tl.int64) * (K // 2) + column[None, :], exists, 0.0
    )
    x, y = tl.split(tl.reshape(values, [BLOCK_N, BLOCK_K // 4, 2]))
    return x, y, code & 3, code >> 2


@triton.jit
def _place(x, y, first, last, POSITION: tl.constexpr):
    """What stands at one position of each group."""
    zero = tl.zeros_like(x)
    return tl.where(first == POSITION, x, tl.where(last == POSITION, y, zero))


@triton.jit
def _sparse_linear_decode_kernel(
    x_ptr,
    values_ptr,
    codes_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[:, rows] = x W[rows]^T + bias[rows] for BLOCK_N rows of the weight a program."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, TOKENS)
    if TOKENS == 1:
        total = tl.zeros([BLOCK_N, BLOCK_K // 4], tl.float32)
    else:
        total = tl.zeros([TOKENS, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        x, y, first, last = _load_packed(values_ptr, codes_ptr, row, start, N, K, BLOCK_N, BLOCK_K)
        if TOKENS == 1:
            group = start + 4 * tl.arange(0, BLOCK_K // 4)
            exists = group < K
            a = tl.load(x_ptr + group, exists, 0.0).to(tl.float32)[None, :]
            b = tl.load(x_ptr + group + 1, exists, 0.0).to(tl.float32)[None, :]
            c = tl.load(x_ptr + group + 2, exists, 0.0).to(tl.float32)[None, :]
            d = tl.load(x_ptr + group + 3, exists, 0.0).to(tl.float32)[None, :]
            # Positions rise within a group: the first is never 3, the last never 0.
            at_first = tl.where(first == 0, a, tl.where(first == 1, b, c))
            at_last = tl.where(last == 1, b, tl.where(last == 2, c, d))
            total += x.to(tl.float32) * at_first + y.to(tl.float32) * at_last
        else:
            wa, wb = _place(x, y, first, last, 0), _place(x, y, first, last, 1)
            wc, wd = _place(x, y, first, last, 2), _place(x, y, first, last, 3)
            w = tl.reshape(tl.join(tl.join(wa, wc), tl.join(wb, wd)), [BLOCK_N, BLOCK_K])
            column = start + tl.arange(0, BLOCK_K)
            exists = (token[:, None] < M) & (column[None, :] < K)
            rows = tl.load(x_ptr + token[:, None] * K + column[None, :], exists, 0.0)
            if INTERPRETED:
                rows, w = rows.to(tl.float32), w.to(tl.float32)
            # "ieee" matters for fp32 alone, which would otherwise be rounded to TF32.
            total = tl.dot(rows, tl.trans(w), total, input_precision="ieee")
    result = tl.sum(total, 1)[None, :] if TOKENS == 1 else total
    if bias_ptr is not None:
        result += tl.load(bias_ptr + row, row < N, 0.0).to(tl.float32)[None, :]
    stored = (token[:, None] < M) & (row[None, :] < N)
    out = y_ptr + token[:, None].to(tl.int64) * N + row[None, :]
    tl.store(out, round_to(result, y_ptr.dtype.element_ty), stored)


def sparse_linear_decode_triton(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The linear layer of a packed 2:4 weight for few tokens: x @ W^T + bias.

    Args:
        x: [..., K] of 1 to 64 tokens, bfloat16 or float16, K a multiple of 8.
        values: [N, K/2] of x's dtype, contiguous.
        codes: uint8 [N, K/8], contiguous.
        bias: [N] of x's dtype, or None.

    Returns:
        [..., N] of x's dtype.

    Cost: memory-bound in the weight's packed bytes; no temporary memory. Deterministic.
    """
    n, k = values.shape[0], 2 * values.shape[1]
    out = x.new_empty(*x.shape[:-1], n)
    tokens = x.numel() // k if k else 0
    if not tokens or not n:
        return out
    if k % 8 or tokens > MAX_TOKENS:
        raise ValueError(f"{tokens} tokens of {k} features: up to 64 of a multiple of 8 are taken")
    with on_device(x):
        _sparse_linear_decode_kernel[(triton.cdiv(n, BLOCK_N),)](
            x.contiguous(),
            values.contiguous(),
            codes.contiguous(),
            bias,
            out,
            tokens,
            n,
            k,
            1 if tokens == 1 else max(16, triton.next_power_of_2(tokens)),
            BLOCK_N,
            BLOCK_K,
            num_warps=NUM_WARPS,
        )
    return out
