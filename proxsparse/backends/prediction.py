"""How long each executor takes for a layer that nobody measured: a small model of its time.

A call takes a fixed time, and then the longer of two: moving its bytes, and multiplying its tiles
in waves on the GPU's multiprocessors. The two overlap, so they are joined by a norm, which is the
longer where they differ and a fifth more where they are alike. Of each executor a handful of
constants are fitted on measurements of one GPU by benchmarks/fit_rule.py, which writes them into
that GPU's table file. Held out model by model, the predictions of an H200 are within 6 to 10 %.

This file is pure: it runs nothing, reads nothing, and is tested without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

EXECUTORS = ("dense", "decode", "prefill")  # those that have a model
_NORM = 4
_STEP = 64  # columns of a chunk of the kernel for many tokens
_DECODE_STEP = 128
_DECODE_TOKENS = 128  # of the largest tile of the kernel for few
_PACKED, _DENSE = 1.125, 2.0  # bytes of a weight

# Rows and tokens of cuBLAS's tiles, as far as its choice of kernels can be told from outside.
_DENSE_TILES = tuple(
    (rows, tokens)
    for rows in (64, 128, 192, 256)
    for tokens in (64, 128, 192, 256)
    if rows * tokens <= 256 * 192
)
# The layouts of the kernel for many tokens, and the clocks of a chunk: `kCandidates` and the
# constants behind it in csrc/cuda/prefill_plan.h, which tests hold together.
PREFILL_CLOCKS = {
    (256, 192, 2): 990,
    (256, 192, 1): 980,
    (128, 256, 2): 645,
    (128, 256, 1): 780,
    (128, 128, 2): 395,
    (128, 128, 1): 470,
    (128, 64, 2): 305,
    (128, 64, 1): 300,
}
_TILE_CLOCKS, _PART_CLOCKS, _ADD_CLOCKS = 100.0, 5000.0, 4000.0


class Constants(NamedTuple):
    """What one GPU's model needs.

    Attributes:
        multiprocessors: of the GPU.
        dense: fixed microseconds; terabytes a second; 1e-13 s a product and 1e-12 s a row or token
            of a tile and column; microseconds of a tile; and of a sum that is split.
        decode: fixed microseconds; terabytes a second; nanoseconds of a chunk, and picoseconds
            more for each token and 64 rows; microseconds of a cluster.
        prefill: fixed microseconds; terabytes a second; nanoseconds of a clock; clocks of a sum
            that is passed on and of one that is added, over those that the kernel's plan assumes.
        margin: predicted speed-up from which a kernel replaces dense.
        margin_between: the same for 65 to 2,047 tokens that fill no whole tiles, where the
            predictions are worst.
        smallest: out_features, in_features and elements below which nothing is predicted, because
            nothing so small was measured.
        algorithms: cuSPARSELt's best, the most frequent first.
    """

    multiprocessors: int
    dense: tuple[float, ...]
    decode: tuple[float, ...]
    prefill: tuple[float, ...]
    margin: float
    margin_between: float
    smallest: tuple[int, int, int]
    algorithms: tuple[int, ...]

    @classmethod
    def parse(cls, entry: dict[str, Any]) -> Constants:
        """From a table file; raises KeyError, TypeError or ValueError for what is none."""
        fields = {
            name: tuple(float(x) for x in entry[name]) for name in ("dense", "decode", "prefill")
        }
        expected = {"dense": 6, "decode": 5, "prefill": 5}
        for name, numbers in fields.items():
            if len(numbers) != expected[name] or not all(
                math.isfinite(x) and x >= 0 for x in numbers
            ):
                raise ValueError(f"{name} needs {expected[name]} numbers, and is {list(numbers)}")
        n, k, elements = (int(x) for x in entry["smallest"])
        return cls(
            multiprocessors=int(entry["multiprocessors"]),
            margin=float(entry["margin"]),
            margin_between=float(entry["margin_between"]),
            smallest=(n, k, elements),
            algorithms=tuple(int(x) for x in entry["algorithms"]),
            **fields,
        )

    def covers(self, n: int, k: int) -> bool:
        """Whether a layer is like those that were measured; larger ones are."""
        return n >= self.smallest[0] and k >= self.smallest[1] and n * k >= self.smallest[2]


def predict(executor: str, n: int, k: int, tokens: int, constants: Constants) -> float:
    """Seconds of a call of a layer [n, k] on one of `EXECUTORS`, in the layout that it chooses."""
    if executor == "dense":
        return _dense(n, k, tokens, constants)
    if executor == "decode":
        layout = _chosen_decode_layout(n, k, tokens, constants.multiprocessors)
        return predict_decode(layout, n, k, tokens, constants)
    return min(predict_prefill(layout, n, k, tokens, constants) for layout in PREFILL_CLOCKS)


def predict_prefill(
    layout: tuple[int, int, int], n: int, k: int, tokens: int, constants: Constants
) -> float:
    """Seconds of the kernel for many tokens in one of the layouts of `PREFILL_CLOCKS`."""
    fixed, bandwidth, clock, part, add = constants.prefill
    clocks = _plan_clocks(
        layout, n, k, tokens, constants.multiprocessors, part * _PART_CLOCKS, add * _ADD_CLOCKS
    )
    seconds = _moving(n, k, tokens, _PACKED, bandwidth)
    return fixed * 1e-6 + _joined(seconds, clocks * clock * 1e-9)


def predict_decode(
    layout: tuple[int, int, int], n: int, k: int, tokens: int, constants: Constants
) -> float:
    """Seconds of the kernel for few tokens; the layout is rows, depth and splits of a block."""
    fixed, bandwidth, chunk, per_token, cluster = constants.decode
    rows, depth, splits = layout
    tile = min(1 << max(3, (tokens - 1).bit_length()), _DECODE_TOKENS)
    blocks = -(-n // rows) * -(-tokens // _DECODE_TOKENS) * splits
    resident = 1 if depth == 2 or rows // 128 * tile > 128 else 2  # on a multiprocessor
    waves = blocks / (constants.multiprocessors * resident)
    waves = max(1.0, math.ceil(waves) if waves < 4 else waves)
    per_chunk = chunk * 1e-9 + per_token * 1e-12 * tile * rows / 64 * resident
    multiplying = waves * (k / _DECODE_STEP / splits) * per_chunk
    clusters = (1 + math.log2(splits) / 4) * cluster * 1e-6 if splits > 1 else 0.0
    moving = _moving(n, k, tokens, _PACKED, bandwidth)
    return fixed * 1e-6 + _joined(moving, multiplying) + clusters


def _dense(n: int, k: int, tokens: int, constants: Constants) -> float:
    fixed, bandwidth, product, edge, tile_time, split_time = constants.dense
    most = constants.multiprocessors
    least = math.inf
    for rows, columns in _DENSE_TILES:
        tiles = -(-n // rows) * -(-tokens // columns)
        tile = k * (rows * columns * product * 1e-13 + (rows + columns) * edge * 1e-12)
        for parts in (1, 2, 4):
            if parts > 1 and tiles * parts > 2 * most:
                break
            waves = -(-tiles * parts // most)
            seconds = waves * (tile / parts + tile_time * 1e-6)
            least = min(least, seconds + (split_time * 1e-6 if parts > 1 else 0.0))
    return fixed * 1e-6 + _joined(_moving(n, k, tokens, _DENSE, bandwidth), least)


def _chosen_decode_layout(n: int, k: int, tokens: int, most: int) -> tuple[int, int, int]:
    """What `choose_layout` in csrc/cuda/sparse_linear_decode_hopper.cu takes."""
    token_tiles, enough = -(-tokens // _DECODE_TOKENS), most * 5 // 6

    def tiles(rows: int) -> int:
        return -(-n // rows) * token_tiles

    is_one_wave = enough <= tiles(256) <= most
    rows = 64 if tiles(64) <= 2 * most else 256 if is_one_wave and tokens <= 16 else 128
    wanted = enough if k > 8192 else most * 2 // 5
    splits = 1
    while splits < 8 and tiles(rows) * splits < wanted and k >= 512 * splits:
        splits *= 2
    return rows, 2 if tiles(rows) * splits <= most else 1, splits


def _plan_clocks(
    layout: tuple[int, int, int],
    n: int,
    k: int,
    tokens: int,
    multiprocessors: int,
    part: float,
    add: float,
) -> float:
    """What `make_plan` in csrc/cuda/prefill_plan.h counts for its best way to share the tiles."""
    rows, tile_tokens, cluster = layout
    clocks, chunks = PREFILL_CLOCKS[layout], -(-k // _STEP)
    count, most = -(-n // (rows * cluster)) * -(-tokens // tile_tokens), multiprocessors // cluster
    whole = chunks * clocks + _TILE_CLOCKS
    least = -(-count // most) * whole
    if count % most == 0:
        return least
    if count > most:
        shared = most + count % most
        in_parts = -(-shared * chunks // most) * clocks + 2 * _TILE_CLOCKS + part + add
        return min(least, (count // most - 1) * whole + in_parts)
    for parts in range(2, min(8, chunks) + 1):
        clusters = min(count * parts, most)
        of_each = -(-count * chunks // clusters) * clocks + _TILE_CLOCKS
        least = min(least, of_each + part + (-(-clusters // count) - 1) * add)
        if clusters == most:
            break
    return least


def _moving(n: int, k: int, tokens: int, weight_bytes: float, bandwidth: float) -> float:
    """Seconds that the bytes of weight, tokens and results take at so many terabytes a second."""
    return (weight_bytes * n * k + 2 * tokens * (n + k)) / (bandwidth * 1e12)


def _joined(first: float, second: float) -> float:
    return float((first**_NORM + second**_NORM) ** (1 / _NORM))


def predicted_speedup(
    executor: str, n: int, k: int, counts: Sequence[int], constants: Constants
) -> float:
    """Over dense, the smallest of the token counts."""
    return min(
        predict("dense", n, k, tokens, constants) / predict(executor, n, k, tokens, constants)
        for tokens in counts
    )
