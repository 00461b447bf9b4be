"""What every launch needs: tile, vector width, device and scalar arguments."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

# Eight elements a thread: two groups, enough independent work to cover the latency of the solver.
BLOCK = 1024
NUM_WARPS = 4
# Of the fused updates, whose tiles agree on how to solve: a warp does that without waiting for
# others, and seldom goes the long way for their sake. They move enough bytes to be worth a block of
# one warp; `prox_2to4` does not.
UPDATE_BLOCK = 256
UPDATE_NUM_WARPS = 1


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make x's device current, where Triton launches; no-op for the interpreter's CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def by_value(x: Tensor | float) -> Tensor | float:
    """A scalar argument: CPU values are passed as floats, CUDA ones as pointers (no host sync)."""
    if isinstance(x, Tensor):
        return x if x.is_cuda else float(x.item())
    return float(x)


def vector_width(row: int, *tensors: Tensor | None) -> int:
    """Elements a thread loads at once, so that one load of the widest operand is 16 bytes.

    All operands share it: with different widths the compiler would move data between threads. `row`
    is the number of contiguous elements, of which the width must be a divisor.
    """
    widest = max(x.element_size() for x in tensors if x is not None)
    return 8 if widest == 2 and row % 8 == 0 else 4


def solver_steps(result: Tensor) -> int:
    """Iterations of the group solver: one less when the result is rounded to bfloat16 anyway."""
    return 2 if result.dtype == torch.bfloat16 else 3
