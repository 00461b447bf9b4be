"""The FP8 product of a 2:4 weight against dense FP8 and dense bfloat16.

    python benchmarks/bench_sparse_linear_fp8.py [--models NAME ...] [--tokens M ...] [--quick]
        [--layouts] [--out DIR]

`bf16` is cuBLAS on the layer before it was pruned; `rowwise` and `tensorwise` are torch._scaled_mm
on that layer rounded to FP8, with a scale for each row and token or one for each tensor; `sparse`
is our kernel for so many tokens on the pruned layer, rounded the same way. All FP8 products have
fast sums. The names with `+q` have the rounding of the tokens in them. Every round replays a CUDA
graph of each once, in another order, on random data, with enough weights in rotation to leave the
L2 cache behind. With --layouts the kernel's layouts are tried on every cell, and the best is a row
of its own. Needs a GPU of compute capability 9.0.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from bench_sparse_linear import MODELS, TOKENS
from harness import copy_bandwidth, describe_run, results_directory
from torch import Tensor

from proxsparse import ops
from proxsparse.backends.executors import DECODE_LAYOUTS, PREFILL_LAYOUTS
from proxsparse.backends.fp8 import decode_kernel, multiply_dense, prefill_kernel, quantized
from proxsparse.ops import FP8, reference

ROTATED_BYTES = 160e6  # of packed weights: more than any L2 cache
MAX_WEIGHTS = 40
ROUND_SECONDS = 2e-3
LARGE = 50_000_000  # weights of a layer that decoding is judged on
FP8_LAYOUTS = range(2, 8)  # of PREFILL_LAYOUTS, those that the FP8 kernel has
MOST_FEW = 128  # tokens that the kernel for few is measured with
ERROR_TOKENS = 256  # that the errors are taken over
QUICK = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]
QUICK_TOKENS = (16, 256, 1024, 4096, 16384)


@dataclasses.dataclass
class Weight:
    """One weight before pruning, in 16 and 8 bits, and pruned, packed in 8 bits."""

    dense: Tensor
    rounded: Tensor
    rounded_scale: Tensor
    tensor_rounded: Tensor
    tensor_scale: Tensor
    values: Tensor
    tiles: Tensor
    scale: Tensor

    @classmethod
    def random(cls, n: int, k: int) -> Weight:
        """Normal weights, pruned by magnitude."""
        dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        largest = dense.float().abs().amax() / 448
        pruned, scale = ops.quantize_fp8(ops.project_2to4(dense))
        values, codes = ops.pack_2to4(pruned)
        return cls(
            dense,
            *ops.quantize_fp8(dense),
            (dense.float() / largest).to(FP8),
            largest,
            values,
            reference.tile_codes_8_bit(codes),
            scale,
        )


class Case:
    """One layer at one token count, and what runs on it."""

    def __init__(self, weights: list[Weight], m: int) -> None:
        self.weights = weights
        self.n, self.k = weights[0].dense.shape
        self.m = m
        self.x = torch.randn(m, self.k, device="cuda", dtype=torch.bfloat16)
        self.x_values, self.x_scale = quantized(self.x)
        self.x_largest = self.x.float().abs().amax() / 448
        self.x_tensor = (self.x.float() / self.x_largest).to(FP8)

    def bf16(self, w: Weight) -> Tensor:
        """Runs cuBLAS in 16 bits."""
        return torch.nn.functional.linear(self.x, w.dense)

    def rowwise(self, w: Weight) -> Tensor:
        """Runs the dense FP8 product on tokens that are rounded already."""
        return self._rowwise(w, self.x_values, self.x_scale)

    def rowwise_q(self, w: Weight) -> Tensor:
        """Rounds the tokens, too."""
        return self._rowwise(w, *quantized(self.x))

    def _rowwise(self, w: Weight, x_values: Tensor, x_scale: Tensor) -> Tensor:
        return multiply_dense(x_values, x_scale, w.rounded, w.rounded_scale, None, torch.bfloat16)

    def tensorwise(self, w: Weight) -> Tensor:
        """Runs the dense FP8 product with a scale for each tensor."""
        result: Tensor = torch._scaled_mm(
            self.x_tensor,
            w.tensor_rounded.t(),
            scale_a=self.x_largest,
            scale_b=w.tensor_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return result

    @property
    def kernel(self) -> Callable[..., Any]:
        """Makes the one of ours that is meant for so many tokens."""
        return decode_kernel if self.m <= MOST_FEW else prefill_kernel

    def sparse(self, w: Weight, layout: int = -1) -> Tensor:
        """Runs our kernel on tokens that are rounded already."""
        return self._sparse(w, self.x_values, self.x_scale, layout)

    def sparse_q(self, w: Weight) -> Tensor:
        """Rounds the tokens, too."""
        return self._sparse(w, *quantized(self.x))

    def _sparse(self, w: Weight, x_values: Tensor, x_scale: Tensor, layout: int = -1) -> Tensor:
        kernel = self.kernel(0, torch.bfloat16, self.n, self.k, layout)
        result: Tensor = kernel(x_values, x_scale, w.values, w.tiles, w.scale, None)
        return result


def capture(run: Callable[[Weight], Tensor], case: Case) -> torch.cuda.CUDAGraph:
    """A graph of one call for each weight."""
    run(case.weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in case.weights:
            run(weight)
    return graph


def time_graph(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Seconds of one replay."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(500_000)
    before.record()
    for _ in range(repeats):
        graph.replay()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3 / repeats


def errors(case: Case) -> tuple[float, float]:
    """Of sparse and of rowwise against float64, each on its own rounded operands."""
    w = case.weights[0]
    m = min(case.m, ERROR_TOKENS)
    x = case.x_values[:m].double() * case.x_scale[:m].double().unsqueeze(1)
    codes = reference.untile_codes_8_bit(w.tiles, case.n)
    pruned = reference.unpack_2to4(w.values, codes).double() * w.scale.double().unsqueeze(1)
    rounded = w.rounded.double() * w.rounded_scale.double().unsqueeze(1)
    found = []
    for run, weight in ((case.sparse, pruned), (case.rowwise, rounded)):
        exact = x @ weight.T
        found.append(((run(w)[:m].double() - exact).norm() / exact.norm()).item())
    return found[0], found[1]


def kernel_name(run: Callable[[Weight], Tensor], case: Case) -> str:
    """Of the longest kernel of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(case.weights[0])
        torch.cuda.synchronize()
    longest = max(profile.key_averages(), key=lambda e: e.device_time_total, default=None)
    return "unknown" if longest is None else longest.key[:100]


def measure(case: Case, rounds: int, with_layouts: bool) -> dict[str, Any]:
    """One cell: microseconds of each backend, errors, names of kernels."""
    mine, dense = errors(case)
    runs: dict[str, Callable[[Weight], Tensor]] = {
        "bf16": case.bf16,
        "rowwise": case.rowwise,
        "tensorwise": case.tensorwise,
        "sparse": case.sparse,
        "rowwise+q": case.rowwise_q,
        "sparse+q": case.sparse_q,
    }
    graphs = {name: capture(run, case) for name, run in runs.items()}
    best_layout = None
    if with_layouts:
        timed = {}
        layouts = DECODE_LAYOUTS if case.m <= MOST_FEW else PREFILL_LAYOUTS
        for layout in range(len(layouts)):
            if case.m > MOST_FEW and layout not in FP8_LAYOUTS:
                continue
            graph = capture(lambda w, layout=layout: case.sparse(w, layout), case)
            timed[min(time_graph(graph, 1) for _ in range(3))] = (layout, graph)
        layout, graphs["sparse best layout"] = timed[min(timed)]
        best_layout = list(layouts[layout])
    repeats = {
        name: max(1, math.ceil(ROUND_SECONDS / time_graph(graph, 1)))
        for name, graph in graphs.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    order = list(graphs)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            seconds[name].append(time_graph(graphs[name], repeats[name]) / len(case.weights))
    micros = {name: statistics.median(times) * 1e6 for name, times in seconds.items()}
    return {
        "n": case.n,
        "k": case.k,
        "tokens": case.m,
        "us": {name: round(value, 2) for name, value in micros.items()},
        "best_layout": best_layout,
        "error": mine,
        "error_rowwise": dense,
        "kernels": {
            name: kernel_name(runs[name], case) for name in ("bf16", "rowwise", "tensorwise")
        },
    }


def geomean(values: Iterable[float]) -> float:
    """NaN where there are none."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def summarise(cells: list[dict[str, Any]]) -> dict[str, float]:
    """The figures others will quote."""

    def ratio(cell: dict[str, Any], over: str, of: str) -> float:
        us = cell["us"]
        other = min(us["rowwise"], us["tensorwise"]) if over == "faster" else us[over]
        result: float = other / us[of]
        return result

    many = [cell for cell in cells if cell["tokens"] >= 1024]
    few = [cell for cell in cells if cell["tokens"] <= 16 and cell["n"] * cell["k"] >= LARGE]
    return {
        "geomean_m1024_vs_fp8": geomean(ratio(c, "rowwise", "sparse") for c in many),
        "geomean_m1024_vs_bf16": geomean(ratio(c, "bf16", "sparse") for c in many),
        "geomean_m1024_vs_fp8_with_rounding": geomean(
            ratio(c, "rowwise+q", "sparse+q") for c in many
        ),
        "geomean_m1024_vs_bf16_with_rounding": geomean(ratio(c, "bf16", "sparse+q") for c in many),
        "geomean_m16_vs_fp8": geomean(ratio(c, "faster", "sparse") for c in few),
        "geomean_m16_vs_bf16": geomean(ratio(c, "bf16", "sparse") for c in few),
        "min_cell_graph": min((ratio(c, "rowwise", "sparse") for c in cells), default=math.nan),
        "error_ratio_max": max((c["error"] / c["error_rowwise"] for c in cells), default=math.nan),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--quick", action="store_true", help="Four layers, five token counts.")
    parser.add_argument("--layouts", action="store_true", help="Try the kernel's layouts, too.")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, default=math.inf, help="Begin no cell after that.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    began = time.monotonic()
    shapes = list(dict.fromkeys((n, k) for model in arguments.models for n, k, _ in MODELS[model]))
    if arguments.quick:
        shapes = QUICK
    tokens = arguments.tokens or (QUICK_TOKENS if arguments.quick else TOKENS)
    rounds = arguments.rounds or (7 if arguments.quick else 15)
    torch.manual_seed(0)
    random.seed(0)
    print(f"copy bandwidth {copy_bandwidth(1 << 30, torch.device('cuda')) / 1e9:.0f} GB/s")
    cells: list[dict[str, Any]] = []
    for n, k in shapes:
        count = min(max(math.ceil(ROTATED_BYTES / (0.625 * n * k)), 2), MAX_WEIGHTS)
        weights = [Weight.random(n, k) for _ in range(count)]
        for m in tokens:
            if time.monotonic() - began > arguments.seconds:
                print(f"out of time before {n}x{k} x {m}")
                continue
            cells.append(measure(Case(weights, m), rounds, arguments.layouts))
            cell = cells[-1]
            us = " ".join(f"{name} {value}" for name, value in cell["us"].items())
            gain = cell["us"]["rowwise"] / cell["us"]["sparse"]
            print(
                f"{n}x{k} x {m}: {us} us; sparse {gain:.2f}x rowwise, errors {cell['error']:.2e} "
                f"and {cell['error_rowwise']:.2e}, layout {cell['best_layout']}",
                flush=True,
            )
        del weights
    result = {
        **describe_run(),
        "settings": {"tokens": list(tokens), "rounds": rounds, "layouts": arguments.layouts},
        "summary": {name: round(value, 3) for name, value in summarise(cells).items()},
        "cells": cells,
    }
    out = arguments.out or results_directory()
    out.mkdir(parents=True, exist_ok=True)
    (out / "sparse_linear_fp8.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["summary"], indent=2))


if __name__ == "__main__":
    main()
