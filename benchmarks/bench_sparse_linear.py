"""The linear layer of a 2:4 weight against dense cuBLAS and against PyTorch's own 2:4 path.

    python benchmarks/bench_sparse_linear.py [--models NAME ...] [--tokens M ...] [--quick]
        [--dtype bfloat16|float16] [--tune-seconds S] [--out DIR]

Shapes are the linear layers of five models, from one token to 16384: powers of two, which fill the
tiles of every kernel, and some counts between them, as prompts have. Every round times
each backend of a cell once, in another order, on the same random data, with enough weights in
rotation to leave the L2 cache behind, once replayed from a CUDA graph and once called in eager mode
with the host's time in it. `dense` is the layer as it was before it was pruned, `masked` the same
layer with its pruned weights zero: both are cuBLAS, but zeros switch fewer transistors, so a GPU at
its power limit runs `masked` at higher clocks. PyTorch's path gets its best algorithm, by trying
all of them on the cell. Needs a GPU with sparse tensor cores.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import copy_bandwidth, describe_run, results_directory, time_once
from torch import Tensor

from proxsparse import ops
from proxsparse.backends.table import table_for
from proxsparse.inference.sparse_linear import SparseLinear
from proxsparse.tuning import tune

# (N, K, has_bias) of the layers of a block; q, k and v of a model share K, gate and up are alike.
MODELS = {
    "llama-2-7b": [(4096, 4096, False), (11008, 4096, False), (4096, 11008, False)],
    "llama-3.1-8b": [
        *((4096, 4096, False), (1024, 4096, False)),
        *((14336, 4096, False), (4096, 14336, False)),
    ],
    "llama-3-70b": [
        *((8192, 8192, False), (1024, 8192, False)),
        *((28672, 8192, False), (8192, 28672, False)),
    ],
    "qwen2.5-7b": [
        *((3584, 3584, True), (512, 3584, True), (3584, 3584, False)),
        *((18944, 3584, False), (3584, 18944, False)),
    ],
    "qwen2.5-14b": [
        *((5120, 5120, True), (1024, 5120, True), (5120, 5120, False)),
        *((13824, 5120, False), (5120, 13824, False)),
    ],
}
BETWEEN = (700, 1500, 3000)
MIDDLE = (96, 128, 160, 192, 256, 384, 512, 768, 1000)  # batched decoding, prefill in chunks
TOKENS = tuple(sorted({*(2**i for i in range(15)), *BETWEEN, *MIDDLE}))
LARGE = 50e6  # bytes of a dense weight
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_WEIGHTS = 64
# That one round lasts, at least and about, whichever backend runs: what it takes to begin and to
# end, in eager mode some 0.1 ms of an idle device, is then the same part of every backend's time.
ROUND_SECONDS, EAGER_SECONDS = 2e-3, 10e-3
MAX_ALGORITHMS = 64  # tried for PyTorch's path; its library has fewer


@dataclasses.dataclass
class Weight:
    """One weight as the layers that are compared: before pruning, and 2:4 in three forms."""

    dense: torch.nn.Linear
    masked: torch.nn.Linear
    sparse: SparseLinear
    theirs: Tensor


@dataclasses.dataclass
class Case:
    """One layer at one token count, and what runs on it."""

    n: int
    k: int
    has_bias: bool
    tokens: int
    x: Tensor
    bias: Tensor | None
    weights: list[Weight]

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.n}x{self.k}{' bias' if self.has_bias else ''}"

    def dense(self, weight: Weight) -> Tensor:
        """Runs nn.Linear, which is cuBLAS, on the weight before it was pruned."""
        return weight.dense(self.x)

    def masked(self, weight: Weight) -> Tensor:
        """Runs nn.Linear on the 2:4 weight with its zeros."""
        return weight.masked(self.x)

    def ours(self, weight: Weight) -> Tensor:
        """Runs SparseLinear, with keep_dense=True."""
        return weight.sparse(self.x)

    def theirs_eager(self, weight: Weight) -> Tensor:
        """PyTorch's path as its documentation has it used."""
        return torch.nn.functional.linear(self.x, weight.theirs, self.bias)

    def theirs_with(self, algorithm: int) -> Callable[[Weight], Tensor]:
        """PyTorch's product with one algorithm; x is padded beforehand, which is not timed."""
        padded = torch.nn.functional.pad(self.x, (0, 0, 0, -self.tokens % 8))

        def run(weight: Weight) -> Tensor:
            result = torch._cslt_sparse_mm(
                weight.theirs.packed,
                padded.t(),
                bias=self.bias,
                transpose_result=True,
                alg_id=algorithm,
            )
            return result[: self.tokens]

        return run


def error(result: Tensor, exact: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((result.double() - exact).norm() / exact.norm()).item()


def check(case: Case) -> None:
    """Raises unless our product is as exact as that of the masked layer, within 10 %."""
    weight = case.weights[0]
    exact = case.x.double() @ weight.masked.weight.double().T
    if case.bias is not None:
        exact += case.bias.double()
    ours, dense = error(case.ours(weight), exact), error(case.masked(weight), exact)
    assert ours <= 1.1 * dense, f"{case.name} x {case.tokens}: error {ours:.3g}, dense {dense:.3g}"


def capture(run: Callable[[Weight], Tensor], weights: Sequence[Weight]) -> torch.cuda.CUDAGraph:
    """A graph of one call for each weight."""
    run(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            run(weight)
    return graph


def time_eager(run: Callable[[Weight], Tensor], weights: Sequence[Weight], calls: int) -> float:
    """Seconds a call of a queue of calls, launches and all, by the host's clock."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for index in range(calls):
        run(weights[index % len(weights)])
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def time_host(run: Callable[[Weight], object], weight: Weight, calls: int = 50) -> float:
    """Seconds that the host spends on a call, while the GPU is busy with something else."""
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
        start = time.perf_counter()
        for _ in range(calls):
            run(weight)
        seconds.append((time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return min(seconds)


def best_algorithm(case: Case) -> tuple[int, Callable[[Weight], Tensor]]:
    """The algorithm with which PyTorch's product is fastest, and right, on this cell."""
    reference = case.masked(case.weights[0]).double()
    best = (math.inf, 0)
    for algorithm in range(MAX_ALGORITHMS):
        run = case.theirs_with(algorithm)
        try:
            if error(run(case.weights[0]), reference) > 0.01:
                continue
            graph = capture(run, case.weights)
        except RuntimeError:  # not an algorithm, or not for this shape
            continue
        device = case.x.device
        best = min(best, (min(time_once(graph.replay, device) for _ in range(3)), algorithm))
    return best[1], case.theirs_with(best[1])


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times the backends of one cell, each once a round; seconds by backend and mode."""
    algorithm, theirs_best = best_algorithm(case)
    runs = {"dense": case.dense, "masked": case.masked, "proxsparse": case.ours}
    graph_runs = {**runs, "torch": theirs_best}
    eager_runs = {**runs, "torch": case.theirs_eager}
    device, count = case.x.device, len(case.weights)
    graphs = {name: capture(run, case.weights) for name, run in graph_runs.items()}
    once = {name: time_once(graph.replay, device) for name, graph in graphs.items()}
    replays = {name: max(1, math.ceil(ROUND_SECONDS / taken)) for name, taken in once.items()}
    calls = {
        name: max(count, min(1000, math.ceil(EAGER_SECONDS / (taken / count))))
        for name, taken in once.items()
    }
    calls["torch"] = min(calls["torch"], 20)  # it builds a plan at each call: a few show that
    names = [*runs, "torch"]
    seconds: dict[tuple[str, str], list[float]] = {
        (name, mode): [] for mode in ("graph", "eager") for name in names
    }
    for number in range(rounds + 1):
        # At the power limit a backend leaves its clocks to the next, so all follow upon all.
        order = random.Random(number).sample(names, len(names))
        for name in order:

            def replay(
                graph: torch.cuda.CUDAGraph = graphs[name], times: int = replays[name]
            ) -> None:
                for _ in range(times):
                    graph.replay()

            taken = time_once(replay, device) / (replays[name] * count)
            seconds[name, "graph"].append(taken)
        for name in order:
            taken = time_eager(eager_runs[name], case.weights, calls[name])
            seconds[name, "eager"].append(taken)
    return {
        "algorithm": algorithm,
        "seconds": {key: kept[1:] for key, kept in seconds.items()},  # the first was warm-up
        "host": {name: time_host(run, case.weights[0]) for name, run in eager_runs.items()},
    }


def make_weights(n: int, k: int, bias: Tensor | None, dtype: torch.dtype) -> list[Weight]:
    """As many random weights as it takes to exceed the L2 cache twice in their smallest form."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    count = min(MAX_WEIGHTS, max(2, math.ceil(2 * cache / (1.125 * n * k))))
    weights = []
    for _ in range(count):
        w = (torch.randn(n, k, device="cuda") / math.sqrt(k)).to(dtype)
        dense, masked = linear_of(w, bias), linear_of(ops.project_2to4(w), bias)
        theirs = torch.sparse.to_sparse_semi_structured(masked.weight.data)
        weights.append(
            Weight(dense, masked, SparseLinear.from_linear(masked, keep_dense=True), theirs)
        )
    return weights


def linear_of(weight: Tensor, bias: Tensor | None) -> torch.nn.Linear:
    """The layer with this weight [N, K], which is not copied."""
    n, k = weight.shape
    linear = torch.nn.Linear(k, n, bias=bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(weight)
    linear.bias = None if bias is None else torch.nn.Parameter(bias)
    return linear


def geometric_mean(ratios: Iterable[float]) -> float:
    """NaN for none."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def is_power_of_two(count: int) -> bool:
    return count & (count - 1) == 0


def rows_of(case: Case, measured: dict[str, Any], limit: float) -> list[dict[str, Any]]:
    """The table's rows of one cell, times in microseconds."""
    seconds = measured["seconds"]
    flops = 2 * case.n * case.k * case.tokens
    baseline = {mode: statistics.median(seconds["dense", mode]) for mode in ("graph", "eager")}
    rows = []
    for (backend, mode), kept in seconds.items():
        p20, p50, p80 = (statistics.quantiles(kept, n=10)[i] for i in (1, 4, 7))
        rows.append(
            {
                "case": case.name,
                "tokens": case.tokens,
                "backend": backend,
                "mode": mode,
                "us_p50": round(p50 * 1e6, 2),
                "us_p20": round(p20 * 1e6, 2),
                "us_p80": round(p80 * 1e6, 2),
                "dense_eq_tflop_per_s": round(flops / p50 / 1e12, 1),
                "pct_of_limit": round(100 * limit / p50, 1),
                "speedup": round(baseline[mode] / p50, 3),
                "host_us": round(measured["host"][backend] * 1e6, 2),
            }
        )
    return rows


def summarize(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures others will quote."""
    times = {(r["case"], r["tokens"], r["backend"], r["mode"]): r["us_p50"] for r in rows}
    cells = sorted({(r["case"], r["tokens"]) for r in rows})

    def ratios(
        over: str,
        mode: str,
        lowest: int = 1,
        highest: int = 10**9,
        counts: Callable[[int], bool] = is_power_of_two,
    ) -> list[float]:
        return [
            times[case, tokens, over, mode] / times[case, tokens, "proxsparse", mode]
            for case, tokens in cells
            if lowest <= tokens <= highest and counts(tokens)
        ]

    def mean(*args: Any, **kwargs: Any) -> float:
        return geometric_mean(ratios(*args, **kwargs))

    def lowest(over: str, mode: str) -> float:
        return min(ratios(over, mode, counts=lambda tokens: True))

    def is_between(tokens: int) -> bool:
        return tokens in BETWEEN

    def middle(mode: str, smallest: float) -> float:
        return geometric_mean(
            times[case, tokens, "dense", mode] / times[case, tokens, "proxsparse", mode]
            for case, tokens in cells
            if tokens in MIDDLE and 2 * math.prod(map(int, case.split()[0].split("x"))) >= smallest
        )

    host = {r["backend"]: [] for r in rows}
    for row in rows:
        host[row["backend"]].append(row["host_us"])
    return {
        "geomean_eager_m1024": mean("dense", "eager", 1024),
        "geomean_graph_m1024": mean("dense", "graph", 1024),
        "geomean_graph_m256": mean("dense", "graph", 256, 512),
        "geomean_graph_between": mean("dense", "graph", 512, counts=is_between),
        "geomean_middle": middle("graph", 0),
        "geomean_middle_large": middle("graph", LARGE),
        "geomean_middle_eager": middle("eager", 0),
        "min_cell_graph": lowest("dense", "graph"),
        "min_cell_eager": lowest("dense", "eager"),
        "geomean_eager_m1024_vs_masked": mean("masked", "eager", 1024),
        "geomean_graph_m1024_vs_masked": mean("masked", "graph", 1024),
        "geomean_graph_m256_vs_masked": mean("masked", "graph", 256, 512),
        "geomean_graph_between_vs_masked": mean("masked", "graph", 512, counts=is_between),
        "min_cell_graph_vs_masked": lowest("masked", "graph"),
        "min_cell_eager_vs_masked": lowest("masked", "eager"),
        "vs_torch_best_graph": mean("torch", "graph", 1024),
        "vs_torch_best_graph_between": mean("torch", "graph", 512, counts=is_between),
        "vs_torch_eager": mean("torch", "eager", 1024),
        "host_us_dense": statistics.median(host["dense"]),
        "host_us_proxsparse": statistics.median(host["proxsparse"]),
    }


def write(rows: list[dict[str, Any]], result: dict[str, Any], folder: Path) -> None:
    """CSV, PNG and JSON; the last line of stdout is the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sparse_linear.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "sparse_linear.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(rows, folder / "sparse_linear.png")
    print(json.dumps(result))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over dense by token count, a line for each layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained", dpi=150)
    for axis, mode in zip(figure.subplots(1, 2, sharey=True), ("graph", "eager"), strict=True):
        for case in dict.fromkeys(row["case"] for row in rows):
            points = [
                (row["tokens"], row["speedup"])
                for row in rows
                if (row["case"], row["backend"], row["mode"]) == (case, "proxsparse", mode)
            ]
            axis.plot(*zip(*points, strict=True), marker=".", label=case)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel="tokens", title=f"speed-up over dense, {mode}")
    axis.legend(fontsize=6, ncols=2)
    figure.savefig(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tune-seconds", type=float, default=1800, help="0: no tuning")
    parser.add_argument("--quick", action="store_true", help="one shape, four token counts")
    parser.add_argument("--out", type=Path, help="folder of the results")
    return parser.parse_args()


def main() -> None:
    """Check, tune, measure, print and write."""
    args = parse_arguments()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        sys.exit("bench_sparse_linear.py needs a CUDA GPU of compute capability 8.0 or later")
    reason = ops.can_compress(4096, 4096, DTYPES[args.dtype])
    if reason:
        sys.exit(f"bench_sparse_linear.py cannot run: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    layers = list(dict.fromkeys(layer for model in args.models for layer in MODELS[model]))
    tokens = args.tokens
    if args.quick:
        layers, tokens = layers[:1], [1, 256, 1024, 4096]
    dtype = DTYPES[args.dtype]
    torch.manual_seed(0)

    if args.tune_seconds:
        report = tune.tune_layers(
            layers, tokens, dtype=dtype, device=device.index, seconds=args.tune_seconds
        )
        print(f"tuned: {report}")
    bandwidth = copy_bandwidth(2**30, device)
    square = torch.randn(8192, 8192, device=device, dtype=dtype)
    peak = 2 * 8192**3 / min(time_once(lambda: square @ square, device) for _ in range(10))
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s, dense matmul {peak / 1e12:.0f} TFLOP/s")
    print("limit: the larger of moving 9/16 of the weight, x and the result, and of computing")
    print("at twice the dense rate\n")
    print("case | tokens | backend | mode | us p50 [p20, p80] | TFLOP/s | % of limit | x dense")
    rows: list[dict[str, Any]] = []
    torch_algorithms = {}
    with torch.inference_mode():
        for n, k, has_bias in layers:
            bias = torch.randn(n, device=device).to(dtype) if has_bias else None
            weights = make_weights(n, k, bias, dtype)
            for count in tokens:
                x = torch.randn(count, k, device=device).to(dtype)
                case = Case(n, k, has_bias, count, x, bias, weights)
                check(case)
                measured = measure(case, args.rounds)
                num_bytes = n * k * 9 // 8 + 2 * count * (n + k)
                limit = max(num_bytes / bandwidth, 2 * n * k * count / (2 * peak))
                torch_algorithms[f"{case.name} x {count}"] = measured["algorithm"]
                for row in rows_of(case, measured, limit):
                    rows.append(row)
                    print(
                        f"{row['case']} | {count} | {row['backend']} | {row['mode']} | "
                        f"{row['us_p50']} [{row['us_p20']}, {row['us_p80']}] | "
                        f"{row['dense_eq_tflop_per_s']} | {row['pct_of_limit']} | {row['speedup']}",
                        "SLOWER" if row["speedup"] < 1 else "",
                    )
            del weights
    table = table_for(device.index)
    result = {
        **describe_run(),
        "cusparselt": table.library,
        "tuning_entries": len(table),
        "settings": {"layers": layers, "tokens": tokens, "dtype": args.dtype},
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "dense_tflop_per_s": round(peak / 1e12, 1),
        "torch_algorithms": torch_algorithms,
        "summary": {
            name: round(value, 3)
            for name, value in summarize(rows).items()
            if not math.isnan(value)  # none of its token counts was measured
        },
        "rows": rows,
    }
    write(rows, result, args.out or results_directory())


if __name__ == "__main__":
    main()
