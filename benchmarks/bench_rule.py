"""What the choice by prediction needs to know and tuning tables leave out: small layers, any count.

    python benchmarks/bench_rule.py [--set rule|middle] [--seconds S] [--rounds R] [--out DIR]

`rule`: dense and our two kernels, in the layouts that they choose, for layers of 576 features to
8192 and 1 to 8192 tokens; fit_rule.py reads its rule.json. `middle`: every layout of the kernel for
many tokens for 96 to 1000 tokens, beside dense and the kernel for few, in middle.json; with the
layouts that are not tuned with yet. Replayed from CUDA graphs, with weights in rotation that leave
the L2 cache behind, each once a round; every result is checked against float64 before it is timed.
When the seconds are over, the cells that are left are skipped, the most useful come first. Needs a
GPU of compute capability 9.0.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_sparse_linear import capture, error, geometric_mean
from harness import describe_run, results_directory, time_once
from torch import Tensor

from proxsparse import ops
from proxsparse.backends import executors

# (model, N, K): those that are unlike the others come first.
LAYERS = [
    *(("qwen3-0.6b", n, k) for n, k in ((3072, 1024), (1024, 1024), (1024, 3072), (2048, 1024))),
    *(("smollm2-135m", n, k) for n, k in ((576, 576), (1536, 576), (576, 1536))),
    *(("llama-3.1-8b", n, k) for n, k in ((4096, 4096), (14336, 4096), (4096, 14336))),
    *(("llama-3.2-1b", n, k) for n, k in ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192))),
    *(("qwen2.5-7b", n, k) for n, k in ((3584, 3584), (512, 3584), (18944, 3584), (3584, 18944))),
    *(("gemma-2-2b", n, k) for n, k in ((9216, 2304), (2304, 9216), (2048, 2304))),
    *(("llama-3-70b", n, k) for n, k in ((1024, 8192), (28672, 8192), (8192, 28672))),
    *(("mistral-nemo", n, k) for n, k in ((14336, 5120), (5120, 14336), (1024, 5120))),
]
TOKENS = (1, 8, 16, 33, 64, 96, 128, 160, 256, 384, 512, 700, 1000, 1024, 1500, 2048, 4096, 8192)
MIDDLE_LAYERS = [
    *(("llama-3.1-8b", n, k) for n, k in ((14336, 4096), (4096, 14336), (4096, 4096))),
    *(("llama-3-70b", n, k) for n, k in ((28672, 8192), (8192, 8192))),
    *(("qwen2.5-7b", n, k) for n, k in ((3584, 18944), (18944, 3584))),
    ("llama-3.1-8b", 1024, 4096),
]
MIDDLE_TOKENS = (160, 256, 128, 512, 96, 192, 384, 1000, 768)
LARGE = 50e6  # bytes of a dense weight
ROUND_SECONDS = 0.5e-3
MAX_WEIGHTS = 64


class Weight(NamedTuple):
    """A random weight before it was pruned, and packed."""

    dense: Tensor
    values: Tensor
    codes: Tensor


def make_weights(n: int, k: int) -> list[Weight]:
    """As many as exceed the L2 cache twice, in their smallest form."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    count = min(MAX_WEIGHTS, max(2, math.ceil(2 * cache / (1.125 * n * k))))
    weights = []
    for _ in range(count):
        w = (torch.randn(n, k, device="cuda") / math.sqrt(k)).bfloat16()
        values, codes, _ = ops.lay_out_2to4(*ops.pack_2to4(ops.project_2to4(w)))
        weights.append(Weight(w, values, codes))
    return weights


def backends(n: int, k: int, x: Tensor, is_middle: bool) -> dict[str, Callable[[Weight], Tensor]]:
    """What there is to time, by name; dense first."""
    device, tokens = x.get_device(), x.shape[0]
    runs: dict[str, Any] = {"dense": lambda w: torch.nn.functional.linear(x, w.dense)}
    kernels: dict[str, Any] = {}
    if tokens <= 256:
        kernels["decode"] = executors.Decode((0, 0, 0), device, x.dtype, n, k)
    if tokens > 64:
        kernels["prefill"] = executors.Prefill((0, 0, 0, 0), device, x.dtype, n, k)
        for layout in executors.PREFILL_LAYOUTS if is_middle else ():
            name = "prefill {}/{}/{}/{}".format(*layout)
            kernels[name] = executors.Prefill(layout, device, x.dtype, n, k)
    for name, kernel in kernels.items():
        runs[name] = lambda w, kernel=kernel: kernel(x, w.values, w.codes, None)
    return runs


def measure(
    n: int, k: int, tokens: int, weights: Sequence[Weight], rounds: int, is_middle: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Microseconds of a call by backend, and what is wrong with those that are left out."""
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    masked = ops.project_2to4(weights[0].dense)
    exact = x.double() @ masked.double().T
    allowed = 1.1 * error(torch.nn.functional.linear(x, masked), exact)
    graphs, wrong = {}, {}
    for name, run in backends(n, k, x, is_middle).items():
        try:
            results = [run(weights[0]) for _ in range(2)]
        except RuntimeError as problem:
            wrong[name] = str(problem).splitlines()[0]
            continue
        found = 0.0 if name == "dense" else error(results[0], exact)
        if not found <= allowed:
            wrong[name] = f"its error is {found:.3g}, dense has {allowed / 1.1:.3g}"
        elif not torch.equal(*results):
            wrong[name] = "its results differ from run to run"
        else:
            graphs[name] = capture(run, weights)
    device = x.device
    once = {name: time_once(graph.replay, device) for name, graph in graphs.items()}
    replays = {name: max(1, math.ceil(ROUND_SECONDS / taken)) for name, taken in once.items()}
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(rounds):
        for name in list(graphs)[:: 1 if number % 2 else -1]:

            def replay(
                graph: torch.cuda.CUDAGraph = graphs[name], times: int = replays[name]
            ) -> None:
                for _ in range(times):
                    graph.replay()

            seconds[name].append(time_once(replay, device) / (replays[name] * len(weights)))
    times = {name: round(statistics.median(kept) * 1e6, 2) for name, kept in seconds.items()}
    return times, wrong


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """From 65 to 1023 tokens the best layout over dense: of all, of the tuned ones, the chosen."""
    gains: dict[str, list[float]] = {}
    for row in rows:
        if not 64 < row["tokens"] < 1024:
            continue
        us = row["us"]
        ours = {name: us["dense"] / taken for name, taken in us.items() if name != "dense"}
        tuned = {name: gain for name, gain in ours.items() if name not in untuned()}
        for size in ("", "_large") if 2 * row["n"] * row["k"] >= LARGE else ("",):
            gains.setdefault(f"geomean_middle{size}", []).append(max(1.0, *ours.values()))
            gains.setdefault(f"geomean_middle{size}_tuned", []).append(max(1.0, *tuned.values()))
            gains.setdefault(f"geomean_middle{size}_chosen", []).append(ours.get("prefill", 1.0))
    return {name: round(geometric_mean(values), 3) for name, values in sorted(gains.items())}


def untuned() -> set[str]:
    """Names of the layouts that tuning does not try."""
    layouts = executors.PREFILL_LAYOUTS[executors.NUM_TUNED_PREFILL_LAYOUTS :]
    return {"prefill {}/{}/{}/{}".format(*layout) for layout in layouts}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=("rule", "middle"), default="rule")
    parser.add_argument("--seconds", type=float, default=150, help="no cell starts after them")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder of the result")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        sys.exit("this benchmark needs a CUDA GPU of compute capability 9.0")
    is_middle = args.set == "middle"
    layers, counts = (MIDDLE_LAYERS, MIDDLE_TOKENS) if is_middle else (LAYERS, TOKENS)
    torch.manual_seed(0)
    end = time.monotonic() + args.seconds
    rows: list[dict[str, Any]] = []
    problems: dict[str, str] = {}
    out = args.out or results_directory()
    out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        for model, n, k in layers:
            weights = make_weights(n, k) if time.monotonic() < end else []
            for tokens in counts:
                if time.monotonic() >= end:
                    problems[f"{n}x{k}, {tokens} tokens"] = "the time was over"
                    continue
                times, wrong = measure(n, k, tokens, weights, args.rounds, is_middle)
                problems |= {
                    f"{n}x{k}, {tokens} tokens: {name}": why for name, why in wrong.items()
                }
                rows.append({"model": model, "n": n, "k": k, "tokens": tokens, "us": times})
                ours = {name: taken for name, taken in times.items() if name != "dense"}
                best = min(ours, key=lambda name: ours[name])
                print(
                    f"{n}x{k} | {tokens} | dense {times['dense']} | {best} {ours[best]} | "
                    f"{times['dense'] / ours[best]:.2f}",
                    flush=True,
                )
            del weights
            result = {
                **describe_run(),
                "multiprocessors": torch.cuda.get_device_properties().multi_processor_count,
                "settings": {"set": args.set, "rounds": args.rounds, "tokens": list(counts)},
                "summary": summarize(rows) or {"cells": len(rows)},
                "problems": problems,
                "rows": rows,
            }
            (out / f"{args.set}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"summary": result["summary"], "problems": problems}))


if __name__ == "__main__":
    main()
