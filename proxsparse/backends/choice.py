"""Which executor a call of `sparse_linear` runs on: by measurement, or else by prediction.

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
them decides. Where nothing was measured, `prediction` says what each would take; on a GPU whose
constants are not known either, a rule that is safe says what runs.

This file is pure: it runs nothing, reads nothing, and is tested without a GPU.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection
from typing import NamedTuple

from proxsparse.backends import prediction

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

# Where nothing was measured and nothing can be predicted. On an H200 and an H100 our kernel for
# many tokens beats dense from 1024 tokens on, and the one for few up to 64, for every layer of a
# model of 7 to 70 B parameters that has this many elements; small ones can be slower. More than 64
# tokens ours and the library multiply faster than the weight is unpacked.
RULE_BEATS_DENSE_FROM = 1024
RULE_SMALLEST = 4096 * 4096
RULE_BEATS_UNPACK_FROM = 65
# Between these buckets token counts below the end of their range need `margin_between`.
_BETWEEN = range(65, 2049)
_TILE = 128


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


def count_tiles(tokens: int) -> int:
    """Tiles of 128 tokens up to 2048 tokens, from there 0: a prediction is one for as many."""
    return -(-tokens // _TILE) if tokens <= _BETWEEN[-1] else 0


def range_of(tokens: int) -> tuple[int, bool, int]:
    """What token counts that are decided together have in common.

    The index of their bucket, whether they are its end, and their tiles.
    """
    return bisect.bisect_left(BUCKETS, tokens), tokens in BUCKETS, count_tiles(tokens)


# The lowest token count of each range; above the last bucket there is one more.
RANGE_STARTS = sorted(
    {1, *BUCKETS, *(count + 1 for count in BUCKETS), *range(1, _BETWEEN[-1], _TILE)}
)


def find_bucket(tokens: int) -> int:
    """The bucket of a token count of at least 1; the last one for those above it."""
    return BUCKETS[min(bisect.bisect_left(BUCKETS, tokens), len(BUCKETS) - 1)]


class Choice(NamedTuple):
    """What a call runs on, and why, in words for the log."""

    candidate: Candidate
    reason: str


def choose(
    record: Record | None,
    tokens: int,
    available: Collection[str],
    cell: Cell | None = None,
    constants: prediction.Constants | None = None,
) -> Choice:
    """What a call runs on.

    The answer is the same for all token counts of one `range_of`, and for those above the last
    bucket the same as at the last bucket.

    Args:
        record: measurements of its cell, if there are any.
        tokens: of the call.
        available: executors whose form of the weight is at hand; `unpack` always is.
        cell: of the call, for a prediction where there is no record.
        constants: of the GPU's model, if there are any.

    Returns:
        With the dense weight at hand, the fastest candidate that is faster than it by MARGIN, or
        dense; without, the fastest there is.
    """
    measured = {} if record is None else record.timings(tokens)
    timings = [timing for name, timing in measured.items() if name in available]
    if "dense" in available:
        if record is None:
            return choose_unmeasured(tokens, available, cell, constants)
        timings = [timing for timing in timings if timing.is_faster_than_dense]
        if not timings:
            return Choice(Candidate("dense"), "measured: nothing is faster")
    elif not timings:
        return choose_unmeasured(tokens, available, cell, constants)
    best = max(timings, key=lambda timing: timing.speedup)
    return Choice(best.candidate, f"measured: {best.speedup:.2f} times as fast as dense")


def predict_speedups(
    cell: Cell, tokens: int, available: Collection[str], constants: prediction.Constants
) -> dict[str, float]:
    """Executor -> predicted speed-up over dense, for those available that have a model.

    As for measurements, the worst of the counts that stand for a range decides below its end, but
    where a range has several tiles of tokens: there the lowest count of as many tiles does.
    """
    counts = (cell.bucket,) if tokens >= cell.bucket else cell.interior
    if tokens < cell.bucket and cell.bucket in _BETWEEN:
        counts = (max(cell.lowest, count_tiles(tokens) * _TILE - _TILE + 1),)
    return {
        name: prediction.predicted_speedup(name, cell.n, cell.k, counts, constants)
        for name in prediction.EXECUTORS
        if name in available and name != "dense"
    }


def choose_unmeasured(
    tokens: int,
    available: Collection[str],
    cell: Cell | None,
    constants: prediction.Constants | None,
) -> Choice:
    """What runs where nothing was measured.

    By prediction, where the GPU's constants are known and something like the layer was measured for
    them: a kernel of ours replaces dense if it is predicted to win by the margin that made up for
    wrong predictions when models were held out. A layer smaller than that, or one nobody can say
    anything of, runs dense while the dense weight is held.
    """
    if cell is None or constants is None:
        return choose_by_rule(tokens, available, cell)
    speedups = predict_speedups(cell, tokens, available, constants)
    if not speedups:
        return choose_by_rule(tokens, available, cell)
    best = max(speedups, key=lambda name: speedups[name])
    reason = f"predicted: {best} {speedups[best]:.2f} times as fast as dense"
    if "dense" not in available:
        return Choice(Candidate(best), reason)
    if not constants.covers(cell.n, cell.k):
        return Choice(Candidate("dense"), "nothing as small was measured on this GPU")
    is_between = tokens < cell.bucket and cell.bucket in _BETWEEN
    margin = constants.margin_between if is_between else constants.margin
    if speedups[best] < margin:
        return Choice(Candidate("dense"), f"{reason}, and {margin:.2f} is asked of a prediction")
    return Choice(Candidate(best), reason)


def choose_by_rule(tokens: int, available: Collection[str], cell: Cell | None) -> Choice:
    """What runs where nothing was measured or predicted: see the constants above for why.

    With the dense weight at hand, dense, but for large layers: from 1024 tokens on our kernel for
    many, where it is available, and up to 64 the one for few. Without it the kernel for many or
    else cuSPARSELt with its default algorithm from 65 tokens on, with fewer the kernel for few, and
    the weight unpacked for the call where nothing else can run.
    """
    reason = "by rule: neither measured nor predicted on this GPU"
    names = ["decode"]
    if "dense" in available:
        is_large = cell is not None and cell.n * cell.k >= RULE_SMALLEST
        names = [] if not is_large else ["prefill"] if tokens >= RULE_BEATS_DENSE_FROM else names
        names.append("dense")
    elif tokens >= RULE_BEATS_UNPACK_FROM:
        names = ["prefill", "cusparselt", "decode"]
    name = next((name for name in names if name in available), "unpack")
    return Choice(Candidate(name), reason)
