"""The child process of `tuning.ChildWorker`: verifies and times candidates on a GPU.

    python -m proxsparse.tuning_worker DEVICE

Requests and answers are JSON objects, a line each, on stdin and stdout. An error of CUDA itself
leaves a process without a working GPU, so this one then ends and the parent takes the last trial
for the culprit. Everything else that goes wrong is answered.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from proxsparse import backend_cuda, ops, tuning
from proxsparse.cusparselt import extension as _cuda
from proxsparse.tuning import Candidate, Cell, Outcome

# A candidate's error may be this much above dense's: relative, and in its largest entry. Rounding
# differs with the order of summation; a wrong tile is orders of magnitude above.
_TOLERANCE = 1.1
_LARGEST_TOLERANCE = 4.0
_REPEATS = 3  # runs that must agree bit for bit
_QUICK_ROUNDS, _FINAL_ROUNDS = 5, 15
_ROUND_SECONDS = 2e-3  # of GPU work, at least, that one round times
_MAX_WEIGHTS = 64


@dataclasses.dataclass
class _Weight:
    """One weight in every form."""

    dense: Tensor
    values: Tensor
    codes: Tensor
    compressed: Tensor


class Bench:
    """Data of the current cell on one GPU, and the trials."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._shape: tuple[Any, ...] = ()
        self._cell: Cell | None = None
        self._weights: list[_Weight] = []
        self._bias: Tensor | None = None
        self._inputs: dict[int, Tensor] = {}
        self._exact: dict[int, tuple[Tensor, float, float]] = {}

    def candidates(self, cell: Cell) -> list[Candidate]:
        """What there is to try for the cell, without split-K variants."""
        self._prepare(cell)
        found = [Candidate(name) for name in backend_cuda.RUNS if name != "dense"]
        dtype = self._weights[0].dense.dtype
        if not backend_cuda.can_decode(cell.k, cell.bucket, dtype, self._device):
            count = len(backend_cuda.DECODE_LAYOUTS) if _cuda.has_decode else 0
            layouts = range(tuning.LIBRARY_CHOICE, count)
            found += [Candidate("decode", layout) for layout in layouts]
        problem = _cuda.SparseLinear(
            *(self._device, backend_cuda.CODES[dtype], cell.n, cell.k),
            *(cell.has_bias, tuning.LIBRARY_CHOICE, 1, 0, False),
        )
        padded = -(-cell.bucket // 8) * 8
        bias = 0 if self._bias is None else self._bias.data_ptr()
        count = problem.count_algorithms(padded, bias)
        ids = (tuning.LIBRARY_CHOICE, *range(count))
        return found + [Candidate("cusparselt", algorithm) for algorithm in ids]

    def measure(self, cell: Cell, candidate: Candidate, is_final: bool) -> Outcome:
        """Verifies a candidate and times it beside dense, at one end of the cell or at both."""
        self._prepare(cell)
        weight = self._weights[0]
        run = backend_cuda.executor(
            candidate, self._device, weight.dense.dtype, cell.n, cell.k, self._bias
        )
        ends = [cell.bucket, cell.lowest] if is_final else [cell.bucket]
        for tokens in ends:
            wrong = self._check(run, tokens)
            if wrong:
                return Outcome("wrong", wrong)
        rounds = _FINAL_ROUNDS if is_final else _QUICK_ROUNDS
        timed = [self._time(run, tokens, rounds) for tokens in ends]
        speedups = [dense / seconds for seconds, dense in timed]
        return Outcome("ok", "", timed[0][0], speedups[0], speedups[1] if is_final else 0.0)

    def _prepare(self, cell: Cell) -> None:
        """Makes the cell's data; weights are kept from one cell to the next of the same shape."""
        if cell == self._cell:
            return
        self._cell, self._inputs, self._exact = None, {}, {}
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
                self._weights.append(_Weight(w, *ops.pack_2to4(w), ops.compress_2to4(w)))
            self._shape = shape
        self._bias = randn(cell.n).to(dtype) if cell.has_bias else None
        for tokens in {cell.bucket, cell.lowest}:
            self._inputs[tokens] = randn(tokens, cell.k).to(dtype)
        self._cell = cell

    def _call(self, run: Callable[..., Tensor], x: Tensor, weight: _Weight) -> Tensor:
        forms = weight.values, weight.codes, self._bias, weight.compressed, weight.dense
        return run(x, *forms)

    def _run_dense(self, x: Tensor, weight: _Weight) -> Tensor:
        return torch.nn.functional.linear(x, weight.dense, self._bias)

    def _check(self, run: Callable[..., Tensor], tokens: int) -> str:
        """What is wrong with a candidate's numbers; empty when they are as good as dense's."""
        x, weight = self._inputs[tokens], self._weights[0]
        if tokens not in self._exact:
            bias = None if self._bias is None else self._bias.float()
            exact = torch.nn.functional.linear(x.float(), weight.dense.float(), bias)
            self._exact[tokens] = (exact, *_errors(self._run_dense(x, weight), exact))
        exact, dense_error, dense_largest = self._exact[tokens]
        results = []
        for _ in range(_REPEATS):
            # The allocator hands this memory to the candidate: an entry left unwritten shows.
            torch.full(
                (-(-tokens // 8) * 8, exact.shape[1]), math.nan, dtype=x.dtype, device=x.device
            )
            results.append(self._call(run, x, weight))
        error, largest = _errors(results[0], exact)
        # In this form a NaN is wrong, too.
        if not (
            error <= _TOLERANCE * dense_error and largest <= _LARGEST_TOLERANCE * dense_largest
        ):
            return (
                f"at {tokens} tokens its relative error is {error:.2g} (dense {dense_error:.2g}), "
                f"its largest {largest:.2g} (dense {dense_largest:.2g})"
            )
        if any(not torch.equal(result, results[0]) for result in results):
            return f"at {tokens} tokens its results differ from run to run"
        return ""

    def _time(self, run: Callable[..., Tensor], tokens: int, rounds: int) -> tuple[float, float]:
        """Median seconds of a call of the candidate and of dense, timed in turn.

        Calls are replayed from CUDA graphs, one call for each weight.
        """
        x = self._inputs[tokens]
        runs: list[Callable[[_Weight], Tensor]] = [
            lambda weight: self._call(run, x, weight),
            lambda weight: self._run_dense(x, weight),
        ]
        graphs = [_capture(one, self._weights) for one in runs]
        once = [_time_graph(graph, 1) / len(self._weights) for graph in graphs]
        per_replay = max(once) * len(self._weights)
        replays = max(1, math.ceil(_ROUND_SECONDS / per_replay))
        seconds: list[list[float]] = [[], []]
        for _ in range(rounds):
            for graph, kept in zip(graphs, seconds, strict=True):
                kept.append(_time_graph(graph, replays) / (replays * len(self._weights)))
        candidate, dense = map(statistics.median, seconds)
        return candidate, dense


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
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            run(weight)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _time_graph(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Seconds of some replays, on the GPU's clock."""
    before, after = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    before.record()
    for _ in range(replays):
        graph.replay()
    after.record()
    after.synchronize()
    milliseconds: float = before.elapsed_time(after)
    return milliseconds / 1e3


def answer(bench: Bench, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request; errors that the process does not survive are raised."""
    cell = Cell(*request["cell"])
    try:
        if request["do"] == "candidates":
            return {"candidates": bench.candidates(cell)}
        candidate = Candidate(*request["candidate"])
        return bench.measure(cell, candidate, request["final"])._asdict()
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
