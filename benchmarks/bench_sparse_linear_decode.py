"""The linear layer of a 2:4 weight for 1 to 64 tokens: every way to run it, against dense cuBLAS.

    python benchmarks/bench_sparse_linear_decode.py [--shapes NxK ...] [--tokens M ...] [--quick]
        [--out DIR]

For each layer and token count: each layout of the CUDA kernel, the Triton kernel and dense (the
layer before it was pruned), replayed from CUDA graphs over weights that leave the L2 cache behind,
one after the other in each round, on the same random data. The limit is that of moving the packed
weight, x and the result once. The summary takes the best layout of a cell, or dense where none is
faster, as the tuned dispatch does. Needs a GPU with sparse tensor cores.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from bench_sparse_linear import capture, error, geometric_mean
from harness import Row, copy_bandwidth, time_interleaved, write_results
from torch import Tensor

from proxsparse import ops
from proxsparse.backends import executors
from proxsparse.ops.dispatch import implementation

SHAPES = [
    *((4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)),
    *((11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672)),
    *((18944, 3584), (3584, 18944), (13824, 5120), (5120, 13824)),
]
TOKENS = (1, 2, 4, 8, 16, 32, 64)
LARGE = 50e6  # bytes of a dense weight: the shapes whose figures are quoted
ROTATION_BYTES = 200e6


class Weight(NamedTuple):
    """A random weight before it is pruned, and packed, with its codes in rows and in tiles."""

    dense: Tensor
    values: Tensor
    codes: Tensor
    tiles: Tensor


def backends(n: int, k: int, x: Tensor) -> dict[str, Callable[[Weight], Tensor]]:
    """What there is to time on a weight [n, k], by name."""
    from proxsparse.backends import cuda as backend_cuda

    found: dict[str, Callable[[Weight], Tensor]] = {}
    device, dtype = x.get_device(), x.dtype
    if backend_cuda._cuda.has_kernels and k % 64 == 0:
        hopper = torch.cuda.get_device_capability() >= (9, 0)
        for layout in ((0, 0, 0), *executors.DECODE_LAYOUTS):
            if layout[2] > 1 and not hopper:
                continue
            run = executors.Decode(layout, device, dtype, n, k)
            name = "cuda chosen" if layout[0] == 0 else "cuda {}/{}/{}".format(*layout)
            found[name] = lambda w, run=run: run(x, w.values, w.tiles, None)
    triton = implementation("sparse_linear_decode", "triton")
    if not isinstance(triton, str):
        found["triton"] = lambda w: triton(x, w.values, w.codes, None)
    return found


def measure(n: int, k: int, tokens: int, rounds: int, device: torch.device) -> list[Row]:
    """The rows of one cell, dense first; raises if a backend is not as exact as dense."""
    dtype = torch.bfloat16
    count = max(2, math.ceil(ROTATION_BYTES / (1.125 * n * k)))
    weights = []
    for _ in range(count):
        w = (torch.randn(n, k, device=device) / math.sqrt(k)).to(dtype)
        values, codes = ops.pack_2to4(ops.project_2to4(w))
        weights.append(Weight(w, values, codes, ops.lay_out_2to4(values, codes)[1]))
    x = torch.randn(tokens, k, device=device).to(dtype)

    def dense(w: Weight) -> Tensor:
        return torch.nn.functional.linear(x, w.dense)

    masked = ops.project_2to4(weights[0].dense)
    exact = x.double() @ masked.double().T
    allowed = 1.1 * error(torch.nn.functional.linear(x, masked), exact)
    ours = backends(n, k, x)
    for name, run in ours.items():
        found = error(run(weights[0]), exact)
        assert found <= allowed, f"{name} on {n}x{k}, {tokens} tokens: {found:.3g} > {allowed:.3g}"
    runs = {"dense": dense, **ours}
    graphs = [capture(run, weights) for run in runs.values()]
    seconds = time_interleaved([g.replay for g in graphs], lambda: None, device, rounds)
    case, base = f"{n}x{k}, {tokens} tokens", None
    rows = []
    for name, taken in zip(runs, seconds, strict=True):
        num_bytes = n * k * (16 if name == "dense" else 9) // 8 + 2 * tokens * (n + k)
        rows.append(Row(case, name, [t / count for t in taken], num_bytes, base))
        base = base or rows[0]
    return rows


def summarize(cells: dict[tuple[int, int, int], list[Row]], bandwidth: float) -> dict[str, float]:
    """The figures others will quote, after dispatch: a cell's best, dense included."""
    best = {cell: max(rows, key=lambda row: row.speedup) for cell, rows in cells.items()}
    ours = {
        cell: max((r for r in rows if r.backend.startswith("cuda")), key=lambda r: r.speedup)
        for cell, rows in cells.items()
        if any(r.backend.startswith("cuda") for r in rows)
    }

    def large(cell: tuple[int, int, int]) -> bool:
        return 2 * cell[0] * cell[1] >= LARGE

    few = [best[cell].speedup for cell in best if large(cell) and cell[2] <= 16]
    more = [best[cell].speedup for cell in best if large(cell) and cell[2] > 16]
    shares = [r.bandwidth / bandwidth for cell, r in ours.items() if large(cell) and cell[2] <= 16]
    small = [best[cell].speedup for cell in best if cell[:2] == (4096, 4096) and cell[2] <= 16]
    return {
        "geomean_m16": geometric_mean(few),
        "geomean_m64": geometric_mean(more),
        "speedup_4096_m16": min(small, default=math.nan),
        "pct_of_limit_m16": 100 * statistics.fmean(shares) if shares else math.nan,
        "min_cell": min(row.speedup for row in best.values()),
    }


def draw(cells: dict[tuple[int, int, int], list[Row]], path: Path) -> None:
    """Speed-up over dense by token count, a line for each layer, below the limit of its bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained", dpi=150)
    axis = figure.subplots()
    for n, k in dict.fromkeys(cell[:2] for cell in cells):
        points = [
            (m, max(row.speedup for row in rows))
            for (*shape, m), rows in cells.items()
            if shape == [n, k]
        ]
        axis.plot(*zip(*points, strict=True), marker=".", label=f"{n}x{k}")
    axis.axhline(16 / 9, color="black", linewidth=0.8, linestyle="dashed")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="tokens", ylabel="speed-up over dense")
    axis.legend(fontsize=6, ncols=2)
    figure.savefig(path)


def main() -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", help="NxK, default: layers of 7 to 70 B models")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="two shapes, three token counts")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        sys.exit("this benchmark needs a CUDA GPU of compute capability 8.0 or later")
    shapes, tokens = SHAPES, args.tokens
    if args.shapes:
        shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in args.shapes)]
    if args.quick:
        shapes, tokens = [(4096, 4096), (14336, 4096)], [1, 16, 64]
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(2**30, device)
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    print(f"limit over dense: {16 / 9:.2f}x, the bytes of the weight\n")
    cells: dict[tuple[int, int, int], list[Row]] = {}
    with torch.inference_mode():
        for n, k in shapes:
            for m in tokens:
                cells[n, k, m] = rows = measure(n, k, m, args.rounds, device)
                fastest = max(rows, key=lambda row: row.speedup)
                print(f"{rows[0].case}: {fastest.backend} {fastest.speedup:.2f}x", flush=True)
    settings = {"shapes": shapes, "tokens": tokens, "rotated_bytes": ROTATION_BYTES}
    rows = [row for cell in cells.values() for row in cell]
    summary = summarize(cells, bandwidth)
    title = "sparse_linear_decode, bfloat16"
    write_results(
        *("sparse_linear_decode", title, rows, bandwidth, summary, settings, args.out),
        draw=lambda path: draw(cells, path),
    )


if __name__ == "__main__":
    main()
