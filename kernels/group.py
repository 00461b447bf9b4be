"""A group of four taken apart and put back.

A tile of B elements is held as four tensors of B/4 entries, one per member of the group, so that a
thread has whole groups in its registers and no data moves between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_group(x, BLOCK: tl.constexpr):
    """[BLOCK] -> the four members of its groups, each [BLOCK/4]."""
    low, high = tl.split(tl.reshape(x, [BLOCK // 4, 2, 2]))
    a, c = tl.split(low)
    b, d = tl.split(high)
    return a, b, c, d


@triton.jit
def join_group(a, b, c, d, BLOCK: tl.constexpr):
    """The inverse of `split_group`."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])
