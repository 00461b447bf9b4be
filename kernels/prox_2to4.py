"""The proximal operator on its own: one pass, reads z and writes w."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import round_to, scalar, widen
from .group import join_group, split_group
from .launch import BLOCK, NUM_WARPS, by_value, on_device, solver_steps, vector_width
from .solver import prox_group


@triton.jit
def _prox_2to4_kernel(
    z_ptr, w_ptr, lam, n, STEPS: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):
    """w[tile] = prox_{lam R}(z[tile]); one tile of BLOCK elements a program."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), VECTOR), VECTOR)
    mask = tl.max_constancy(offset < tl.minimum(n - start, BLOCK).to(tl.int32), VECTOR)
    z = widen(tl.load(z_ptr + start + offset, mask, 0.0))
    a, b, c, d = split_group(z, BLOCK)
    a, b, c, d = prox_group(a, b, c, d, scalar(lam), True, STEPS)
    w = round_to(join_group(a, b, c, d, BLOCK), w_ptr.dtype.element_ty)
    tl.store(w_ptr + start + offset, w, mask)


def prox_2to4_triton(z: Tensor, lam: float | Tensor) -> Tensor:
    """The exact proximal operator of lam*R, group by group.

    Args:
        z: [..., K] contiguous, float32, bfloat16 or float16, K a multiple of 4.
        lam: strength >= 0, a float or a 0-d tensor; one on the GPU is read by the kernel.

    Returns:
        A new tensor like z.

    Cost: memory-bound, 2 * element size per element. Deterministic.
    """
    w = torch.empty_like(z)
    n = z.numel()
    if n:
        with on_device(z):
            _prox_2to4_kernel[(triton.cdiv(n, BLOCK),)](
                z,
                w,
                by_value(lam),
                n,
                solver_steps(z),
                vector_width(n, z),
                BLOCK,
                num_warps=NUM_WARPS,
            )
    return w
