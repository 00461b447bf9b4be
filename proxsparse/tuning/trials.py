"""The child process of `child_process.ChildWorker`: verifies and times candidates on a GPU.

    python -m proxsparse.tuning.trials DEVICE

Requests and answers are JSON objects, a line each, on stdin and stdout. An error of CUDA itself
leaves a process without a working GPU, so this one then ends and the parent takes the last trial
for the culprit. Everything else that goes wrong is answered.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.backends import choice, executors, limits
from proxsparse.backends.choice import Candidate, Cell
from proxsparse.backends.cusparselt import extension as _cuda
from proxsparse.ops.cuda_graph import recording
from proxsparse.tuning.search import Outcome

# A candidate's error may be this much above dense's: relative, and in its largest entry. Rounding
# differs with the order of summation; a wrong tile is orders of magnitude above.
_TOLERANCE = 1.1
_LARGEST_TOLERANCE = 4.0
_REPEATS = 3  # runs that must agree bit for bit
# A round times candidate and dense, one after the other, and their ratio is one sample. Many short
# rounds are better than few long ones: the clock of a GPU at its power limit changes within
# milliseconds.
_QUICK_ROUNDS, _FINAL_ROUNDS, _FEWEST_ROUNDS = 5, 13, 3
_QUICK_SECONDS, _FINAL_SECONDS = 4e-4, 1e-3  # a round's GPU work, at least, for each of the two
_LONG_SECONDS = 2e-3  # longer replays of all weights get fewer rounds
_MAX_WEIGHTS = 64


@dataclasses.dataclass
class _Weight:
    """One weight in every form."""

    dense: Tensor
    values: Tensor
    codes: Tensor
    compressed: Tensor


@dataclasses.dataclass
class _Dense:
    """What candidates are compared with at one token count."""

    graph: torch.cuda.CUDAGraph
    error: float
    largest: float


class Bench:
    """Data of the current cell on one GPU, and the trials."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._shape: tuple[Any, ...] = ()
        self._cell: Cell | None = None
        self._weights: list[_Weight] = []
        self._bias: Tensor | None = None
        # For the bucket, and with their first rows for the counts below: x, and what it gives with
        # the first weight in float32.
        self._x = self._exact = torch.empty(0)
        self._dense: dict[int, _Dense] = {}
        self._verified: set[tuple[Candidate, int]] = set()  # at a token count of this cell

    def candidates(self, cell: Cell) -> list[Candidate]:
        """What there is to try for the cell, without split-K variants."""
        self._prepare(cell)
        found = [Candidate(name) for name in executors.RUNS if name != "dense"]
        dtype = self._weights[0].dense.dtype
        if not limits.can_decode(cell.k, cell.bucket, dtype, self._device):
            count = len(executors.DECODE_LAYOUTS) if _cuda.has_kernels else 0
            layouts = range(choice.LIBRARY_CHOICE, count)
            found += [Candidate("decode", layout) for layout in layouts]
        if not limits.can_prefill(cell.n, cell.k, cell.bucket, dtype, self._device):
            layouts = range(choice.LIBRARY_CHOICE, executors.NUM_TUNED_PREFILL_LAYOUTS)
            found += [Candidate("prefill", layout) for layout in layouts]
        problem = _cuda.SparseLinear(
            *(self._device, limits.CODES[dtype], cell.n, cell.k),
            *(cell.has_bias, choice.LIBRARY_CHOICE, 1, 0, False),
        )
        padded = -(-cell.bucket // 8) * 8
        bias = 0 if self._bias is None else self._bias.data_ptr()
        count = problem.count_algorithms(padded, bias)
        ids = (choice.LIBRARY_CHOICE, *range(count))
        return found + [Candidate("cusparselt", algorithm) for algorithm in ids]

    def measure(self, cell: Cell, candidate: Candidate, tokens: int, is_final: bool) -> Outcome:
        """Verifies a candidate and times it beside dense, at one token count of the cell."""
        self._prepare(cell)
        weight = self._weights[0]
        run = executors.executor(
            candidate, self._device, weight.dense.dtype, cell.n, cell.k, self._bias
        )
        if (candidate, tokens) not in self._verified:
            wrong = self._check(run, tokens)
            if wrong:
                return Outcome("wrong", wrong)
            self._verified.add((candidate, tokens))
        return Outcome("ok", "", *self._time(run, tokens, is_final))

    def _prepare(self, cell: Cell) -> None:
        """Makes the cell's data; weights are kept from one cell to the next of the same shape."""
        if cell == self._cell:
            return
        self._cell, self._dense, self._verified = None, {}, set()
        self._x = self._exact = torch.empty(0)
        dtype: torch.dtype = getattr(torch, cell.dtype)
        device = torch.device("cuda", self._device)
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        shape = cell.n, cell.k, cell.dtype
        if shape != self._shape:
            self._shape, self._weights = (), []
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            # The smallest form of all weights together is twice the cache.
            count = min(_MAX_WEIGHTS, max(2, math.ceil(2 * cache / (1.125 * cell.n * cell.k))))
            for _ in range(count):
                w = ops.project_2to4((randn(cell.n, cell.k) / math.sqrt(cell.k)).to(dtype))
                # As SparseLinear holds it.
                values, codes, compressed = ops.lay_out_2to4(*ops.pack_2to4(w))
                if compressed is None:
                    compressed = ops.compress_2to4(w)
                self._weights.append(_Weight(w, values, codes, compressed))
            self._shape = shape
        self._bias = randn(cell.n).to(dtype) if cell.has_bias else None
        self._x = randn(cell.bucket, cell.k).to(dtype)
        bias = None if self._bias is None else self._bias.float()
        weight = self._weights[0].dense.float()
        self._exact = torch.nn.functional.linear(self._x.float(), weight, bias)
        self._cell = cell

    def _call(self, run: Callable[..., Tensor], x: Tensor, weight: _Weight) -> Tensor:
        forms = weight.values, weight.codes, self._bias, weight.compressed, weight.dense
        return run(x, *forms)

    def _dense_at(self, tokens: int) -> _Dense:
        """Dense at a token count, from its first trial on."""
        if tokens not in self._dense:
            x = self._x[:tokens]

            def run(weight: _Weight) -> Tensor:
                return torch.nn.functional.linear(x, weight.dense, self._bias)

            errors = _errors(run(self._weights[0]), self._exact[:tokens])
            self._dense[tokens] = _Dense(_capture(run, self._rotated(tokens)), *errors)
        return self._dense[tokens]

    def _rotated(self, tokens: int) -> list[_Weight]:
        """So many weights that each has left the cache when it is used again."""
        assert self._cell is not None
        n, k = self._cell.n, self._cell.k
        cache = torch.cuda.get_device_properties(self._device).L2_cache_size
        needed = math.ceil(2 * cache / (1.125 * n * k + 2 * tokens * n))
        return self._weights[: max(2, needed)]

    def _check(self, run: Callable[..., Tensor], tokens: int) -> str:
        """What is wrong with a candidate's numbers; empty when they are as good as dense's."""
        x, exact, dense = self._x[:tokens], self._exact[:tokens], self._dense_at(tokens)
        results = []
        for _ in range(_REPEATS):
            # The allocator hands this memory to the candidate: an entry left unwritten shows.
            torch.full(
                (-(-tokens // 8) * 8, exact.shape[1]), math.nan, dtype=x.dtype, device=x.device
            )
            results.append(self._call(run, x, self._weights[0]))
        error, largest = _errors(results[0], exact)
        # In this form a NaN is wrong, too.
        if not (
            error <= _TOLERANCE * dense.error and largest <= _LARGEST_TOLERANCE * dense.largest
        ):
            return (
                f"at {tokens} tokens its relative error is {error:.2g} (dense {dense.error:.2g}), "
                f"its largest {largest:.2g} (dense {dense.largest:.2g})"
            )
        if any(not torch.equal(result, results[0]) for result in results):
            return f"at {tokens} tokens its results differ from run to run"
        return ""

    def _time(self, run: Callable[..., Tensor], tokens: int, is_final: bool) -> tuple[float, float]:
        """Seconds of a call of the candidate and its speed-up over dense: medians of rounds.

        The speed-up is the median of the ratios, not the ratio of the medians: the two times of a
        round meet the same clock of the GPU, those of different rounds need not. Calls are replayed
        from CUDA graphs, one call for each weight.
        """
        x, dense = self._x[:tokens], self._dense_at(tokens).graph
        weights = self._rotated(tokens)
        candidate = _capture(lambda weight: self._call(run, x, weight), weights)
        ((first, second),) = _time_in_turn(candidate, dense, 1, 1)
        longest = max(first, second)
        rounds, least = _QUICK_ROUNDS, _QUICK_SECONDS
        if is_final:
            rounds, least = _FINAL_ROUNDS, _FINAL_SECONDS
        replays = math.ceil(least / longest)
        rounds = max(_FEWEST_ROUNDS, min(rounds, int(rounds * _LONG_SECONDS / longest)))
        times = _time_in_turn(candidate, dense, replays, rounds)
        seconds = statistics.median(own for own, _ in times) / (replays * len(weights))
        return seconds, statistics.median(other / own for own, other in times)


def _errors(result: Tensor, exact: Tensor) -> tuple[float, float]:
    """The relative error in the Frobenius norm, and the largest error over the RMS of `exact`."""
    difference = result.float() - exact
    scale = exact.square().mean().sqrt()
    relative = difference.square().mean().sqrt() / scale
    return relative.item(), (difference.abs().amax() / scale).item()


def _capture(run: Callable[[_Weight], Tensor], weights: Sequence[_Weight]) -> torch.cuda.CUDAGraph:
    """A graph of one call for each weight; results share memory, as they do from layer to layer."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(weights[0])
    torch.cuda.current_stream().wait_stream(stream)
    with recording(stream) as graph:
        for weight in weights:
            run(weight)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _time_in_turn(
    first: torch.cuda.CUDAGraph, second: torch.cuda.CUDAGraph, replays: int, rounds: int
) -> list[tuple[float, float]]:
    """Seconds of some replays of either graph, round by round, on the GPU's clock.

    Everything is queued at once, so that the GPU is never idle, and every other round runs
    backwards, so that a clock that drifts favours neither.
    """
    marks = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2 * rounds + 1)
    ]
    marks[0].record()
    for index, mark in enumerate(marks[1:]):
        # first, second, second, first, and again
        graph = first if index % 4 in (0, 3) else second
        for _ in range(replays):
            graph.replay()
        mark.record()
    marks[-1].synchronize()
    spans = [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]
    pairs = zip(spans[::2], spans[1::2], strict=True)
    return [(b, a) if turn % 2 else (a, b) for turn, (a, b) in enumerate(pairs)]


def answer(bench: Bench, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request; errors that the process does not survive are raised."""
    cell = Cell(*request["cell"])
    try:
        if request["do"] == "candidates":
            return {"candidates": bench.candidates(cell)}
        candidate = Candidate(*request["candidate"])
        return bench.measure(cell, candidate, request["tokens"], request["final"])._asdict()
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        kind, detail = "memory", str(error).splitlines()[0]
    except _cuda.LibraryError as error:
        torch.cuda.synchronize()  # raises if more is broken than this call
        kind, detail = "refused", str(error)
    except Exception as error:
        if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
            raise
        kind, detail = "failed", f"{type(error).__name__}: {error}"
    if request["do"] == "candidates":
        return {"problem": detail}
    return Outcome(kind, detail)._asdict()


def main() -> None:
    """Serves requests until stdin ends."""
    # cuSPARSELt prints to stdout when it refuses something: what is not an answer goes to stderr.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    device = int(sys.argv[1])
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("highest")
    with torch.inference_mode():
        bench = Bench(device)
        print(json.dumps({"ready": True}), file=channel)
        for line in sys.stdin:
            print(json.dumps(answer(bench, json.loads(line))), file=channel)


if __name__ == "__main__":
    main()
