"""Which executor a call of `sparse_linear` runs on: by measurement, or else by rule.

Five executors compute x W^T + bias: `dense` (cuBLAS on an unpacked weight that is held anyway),
`cusparselt`, `decode` and `prefill` (our kernels for few and for many tokens, where they were
built) and `unpack` (the dense weight made anew for the call). None is best everywhere, and a
library's algorithm can be slow or wrong. So `tuning` measures candidates beside dense, and one is
used in its place only if it

- agrees with a float32 product as well as dense does, and with itself, run after run,
- is at least MARGIN times as fast as dense.

That is decided for ranges of token counts, and for the upper end of a range by itself: kernels work
in tiles of 128 or 256 tokens, which a round count fills and the next one does not, so sparse often
wins at 4096 tokens and loses at 3073. Two counts stand for those below the end, and the worse of
them decides. Where nothing was measured, `choose_by_rule` says what runs.

This file is pure: it runs nothing, reads nothing, and is tested without a GPU.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection
from typing import NamedTuple

# Upper ends of the ranges of token counts: powers of two, from 128 with a step half-way because the
# number of tiles, and with it the winner, changes quickly there. 1 is decoding one sequence; more
# than the last count as the last.
BUCKETS = (
    *(1, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768),
    *(1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384),
)
EXECUTORS = ("dense", "cusparselt", "decode", "prefill", "unpack")
MARGIN = 1.03  # measured speed-up that a candidate needs to replace dense
LIBRARY_CHOICE = -1  # an algorithm id: the library's own default

# Where nothing was measured. On an H200 our kernel for many tokens beats dense from 1024 tokens on,
# at powers of two, for every shape that was measured but one (512 x 3584, 1024 tokens: 0.84), and
# in most cells the library's best algorithm. More than 64 tokens both multiply faster than the
# weight is unpacked.
RULE_BEATS_DENSE_FROM = 1024
RULE_BEATS_UNPACK_FROM = 65


class Candidate(NamedTuple):
    """An executor and how it runs; `algorithm` is cuSPARSELt's id, or a layout of our kernels."""

    executor: str
    algorithm: int = LIBRARY_CHOICE
    split_k: int = 1
    split_k_mode: int = 0

    def __str__(self) -> str:
        if self.executor == "cusparselt":
            return f"cusparselt {self.algorithm}/{self.split_k}/{self.split_k_mode}"
        return self.executor if self.algorithm < 0 else f"{self.executor} {self.algorithm}"


class Cell(NamedTuple):
    """What is measured at once: a layer's shape and a range of token counts.

    Attributes:
        n: output features.
        k: input features.
        bucket: the largest token count of the range, one of BUCKETS.
        dtype: e.g. "bfloat16".
        has_bias: whether a bias is added.
    """

    n: int
    k: int
    bucket: int
    dtype: str
    has_bias: bool

    @property
    def lowest(self) -> int:
        """The smallest token count of the range."""
        index = BUCKETS.index(self.bucket)
        return BUCKETS[index - 1] + 1 if index else 1

    @property
    def interior(self) -> tuple[int, ...]:
        """Token counts that stand for those below the bucket, the lowest first.

        The lowest is the worst for tiles. The one half-way fills no whole number of them, either;
        up to 64 tokens there is one tile or two, and the lowest alone will do.
        """
        if self.lowest == self.bucket:
            return ()
        if self.bucket <= 64:
            return (self.lowest,)
        return self.lowest, (self.lowest - 1 + self.bucket) // 2 + 24

    def __str__(self) -> str:
        bias = "bias" if self.has_bias else "no-bias"
        return f"{self.n}x{self.k} m{self.bucket} {self.dtype} {bias}"


class Timing(NamedTuple):
    """A verified candidate, timed beside dense.

    Attributes:
        candidate: what ran.
        seconds: of a call at the token count of `speedup`.
        speedup: over dense, the smallest of the token counts that were measured.
    """

    candidate: Candidate
    seconds: float
    speedup: float

    @property
    def is_faster_than_dense(self) -> bool:
        """By MARGIN."""
        return self.speedup >= MARGIN


class Record(NamedTuple):
    """What is known of a cell: the best candidate of each executor, and what must not be used.

    Attributes:
        top: executor -> its best where the token count is the bucket.
        interior: executor -> its best for the token counts below; empty where there are none.
        banned: candidate -> why.
    """

    top: dict[str, Timing]
    interior: dict[str, Timing]
    banned: dict[str, str]

    def timings(self, tokens: int) -> dict[str, Timing]:
        """What holds for a token count of the cell."""
        return self.top if tokens >= find_bucket(tokens) else self.interior


def find_bucket(tokens: int) -> int:
    """The bucket of a token count of at least 1; the last one for those above it."""
    return BUCKETS[min(bisect.bisect_left(BUCKETS, tokens), len(BUCKETS) - 1)]


def choose(record: Record | None, tokens: int, available: Collection[str]) -> Candidate:
    """What a call runs on.

    The answer is the same for all token counts between two buckets, and for those above the last
    bucket the same as at the last bucket.

    Args:
        record: measurements of its cell, if there are any.
        tokens: of the call.
        available: executors whose form of the weight is at hand; `unpack` always is.

    Returns:
        With the dense weight at hand, the fastest candidate that is faster than it by MARGIN, or
        dense; without, the fastest there is.
    """
    measured = {} if record is None else record.timings(tokens)
    timings = [timing for name, timing in measured.items() if name in available]
    if "dense" in available:
        if record is None:
            return choose_by_rule(tokens, available)
        timings = [timing for timing in timings if timing.is_faster_than_dense]
        if not timings:
            return Candidate("dense")
    elif not timings:
        return choose_by_rule(tokens, available)
    return max(timings, key=lambda timing: timing.speedup).candidate


def choose_by_rule(tokens: int, available: Collection[str]) -> Candidate:
    """What runs where nothing was measured: see the constants above for why.

    From 1024 tokens on our kernel for many, where it is available, or else cuSPARSELt with its
    default algorithm; with fewer the kernel for few tokens, or dense, if the dense weight is held.
    If it is not, the kernel for many or else cuSPARSELt from 65 tokens on, and the weight unpacked
    for the call where nothing else can run.

    This promises nothing: both may lose to dense for narrow layers, and for token counts that are
    no multiples of 128, above all the smaller ones. Tuning finds out.
    """
    has_dense = "dense" in available
    sparse_from = RULE_BEATS_DENSE_FROM if has_dense else RULE_BEATS_UNPACK_FROM
    for name in ("prefill", "cusparselt") if tokens >= sparse_from else ():
        if name in available:
            return Candidate(name)
    if "decode" in available:
        return Candidate("decode")
    return Candidate("dense" if has_dense else "unpack")


# -- measuring
