"""What bench_{prox,project,pack}_2to4.py run: an op that reads a weight and writes once.

On a GPU each op runs on so many weights that none is in the cache when it comes round again, all
captured in one CUDA graph; the time of an ordinary call, launch and all, has a row of its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import (
    Row,
    copy_bandwidth,
    pick_device,
    print_roofline,
    time_interleaved,
    time_once,
    write_results,
)
from torch import Tensor

from proxsparse.ops import dispatch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SIGMA = 0.02  # of a language model's weights
ROTATION_BYTES = 2**29  # several times the L2 cache of any GPU
SHAPES = {
    "cuda": ["4096x4096", "4096x11008", "28672x8192"],
    "cpu": ["1024x4096", "4096x4096"],
}


@dataclass(frozen=True)
class OnePass:
    """An op under test.

    Attributes:
        name: of the op.
        run: what is timed, (w, setting) -> result.
        settings: what `run` is timed with, by the name it has in the table.
        num_bytes: how much must move for a tensor, read and written.
        check: raises unless `run` is right on a tensor.
        baseline: its name in the table and in the summary.
        run_baseline: (w, setting) -> result.
        prepare: makes the input out of random weights.
    """

    name: str
    run: Callable[[Tensor, Any], object]
    settings: dict[str, Any]
    num_bytes: Callable[[Tensor], int]
    check: Callable[[Tensor, Any], None]
    baseline: tuple[str, str]
    run_baseline: Callable[[Tensor, Any], object]
    prepare: Callable[[Tensor], Tensor] = lambda w: w


def main(op: OnePass) -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(description=f"{op.name}: time and bandwidth")
    parser.add_argument("--shapes", nargs="+", help="NxK, default: layers of 7 to 70 B models")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="1024x4096, 3 rounds")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    device = pick_device()
    fast = {"cpu": "cpu", "cuda": "triton"}[device.type]
    shapes, rounds = args.shapes or SHAPES[device.type], args.rounds
    if args.quick:
        shapes, rounds = ["1024x4096"], 3

    torch.manual_seed(0)
    with dispatch.use_backend(fast):
        for setting in op.settings.values():
            for dtype in DTYPES.values():
                op.check(op.prepare(_weight("256x4096", dtype, device)), setting)
    print(f"correct: {op.name} on {fast} meets its reference")
    bandwidth = copy_bandwidth(2**30 if device.type == "cuda" else 2**26, device)

    rows: list[Row] = []
    extra_bytes = 0
    for shape in shapes:
        w = op.prepare(_weight(shape, DTYPES[args.dtype], device))
        num_bytes = op.num_bytes(w)
        print_roofline(num_bytes, bandwidth)
        for label, setting in op.settings.items():
            case = f"{shape} {label}".strip()
            op.run_baseline(w, setting)  # warm-up
            slow = [time_once(lambda: op.run_baseline(w, setting), device)]  # noqa: B023
            base = Row(case, op.baseline[0], slow, num_bytes)
            rows.append(base)
            with dispatch.use_backend(fast), _rotating(op, w, setting) as (run_all, count):
                (seconds,) = time_interleaved([run_all], lambda: None, device, rounds)
                rows.append(Row(case, fast, [t / count for t in seconds], num_bytes, base))
                if device.type == "cuda":
                    rows.append(
                        Row(case, "triton, one call", _calls(op, w, setting), num_bytes, base)
                    )
                    extra_bytes = max(extra_bytes, _extra_memory(op, w, setting))
    best = [row for row in rows if row.backend == fast]
    summary = {
        op.baseline[1]: min(row.speedup for row in best),
        "pct_of_limit_min": 100 * min(row.bandwidth for row in best) / bandwidth,
    }
    if device.type == "cuda":
        calls = [row.median for row in rows if row.backend.endswith("one call")]
        summary |= {"one_call_us_max": 1e6 * max(calls), "extra_bytes_max": extra_bytes}
    settings = {"shapes": shapes, "dtype": args.dtype, "rounds": rounds}
    title = f"{op.name}, {args.dtype}"
    write_results(op.name, title, rows, bandwidth, summary, settings, args.out)


def _weight(shape: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random weights of SIGMA."""
    out_features, in_features = map(int, shape.split("x"))
    return (SIGMA * torch.randn(out_features, in_features, device=device)).to(dtype)


@contextmanager
def _rotating(op: OnePass, w: Tensor, setting: Any) -> Iterator[tuple[Callable[[], object], int]]:
    """A call that runs the op on several copies of w, and how many; on a GPU one graph replay."""
    if not w.is_cuda:
        yield lambda: op.run(w, setting), 1
        return
    count = -(-ROTATION_BYTES // op.num_bytes(w))
    copies = [w.clone() for _ in range(count)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # All results stay alive to the end: each has its own memory, beyond the cache.
        results = [op.run(copy, setting) for copy in copies]
    yield graph.replay, count
    del results


def _calls(op: OnePass, w: Tensor, setting: Any, count: int = 30) -> list[float]:
    """Seconds of ordinary calls by the host's clock, each waited for."""
    seconds = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        op.run(w, setting)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def _extra_memory(op: OnePass, w: Tensor, setting: Any) -> int:
    """Bytes the op holds at its peak beyond its input and its result."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = op.run(w, setting)
    return torch.cuda.max_memory_allocated() - before - _size(result)


def _size(result: object) -> int:
    """Bytes of a tensor or a tuple of them, as the allocator rounds them."""
    tensors = result if isinstance(result, tuple) else (result,)
    return sum(-(-x.nbytes // 512) * 512 for x in tensors if isinstance(x, Tensor))
