"""Fits the model of executors' times that decides where nothing was measured, for one GPU.

    python benchmarks/fit_rule.py [TABLE ...] [--check]

TABLE is a file of proxsparse/backends/tables; by default all that have enough measurements. Beside
its cells, the rows of benchmarks/results/<card>/rule.json count, which bench_rule.py measures:
small layers, and token counts that tables leave out. The constants go into the table file, under
"model". Then one model after the other is held out: its layers are predicted by constants fitted on
all others. Of the margins that a prediction needs to replace dense, those are taken that lose least
there while no more than 0.75 % of the cells fall below 0.97 of dense. `--check` prints that and
writes nothing. Needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from proxsparse.backends import choice, prediction
from proxsparse.backends.choice import Cell
from proxsparse.backends.prediction import Constants
from proxsparse.backends.table import read_records

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "proxsparse" / "backends" / "tables"
# Layers of a model, [N, K], by which the shapes are held out.
MODELS = {
    "llama-2-7b": {(4096, 4096), (11008, 4096), (4096, 11008)},
    "llama-3.1-8b": {(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)},
    "llama-3-70b": {(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)},
    "qwen2.5-7b": {(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)},
    "qwen2.5-14b": {(5120, 5120), (1024, 5120), (13824, 5120), (5120, 13824)},
}
FEWEST = 100  # measurements of an executor, for a fit
START = {  # what the constants of a card of Hopper's kind are near to
    "dense": (3.5, 4.0, 3.3, 0.5, 0.1, 3.0),
    "decode": (2.5, 3.8, 90.0, 2000.0, 0.7),
    "prefill": (0.5, 3.0, 0.8, 1.5, 0.5),
}
SLOWEST, SHARE = 0.97, 0.0075  # of dense; and of the cells that may be slower
MARGINS = (1.03, 1.05, 1.07, 1.1, 1.15)
MARGINS_BETWEEN = (1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4, 1.5)
ROUND = 5  # digits of a constant


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of one layer at one token count, or at the worst of a few.

    Attributes:
        cell: the layer and the range of token counts.
        counts: the token counts; a speed-up is the smallest of theirs, at one of them.
        timings: executor -> (seconds, speed-up over dense).
        models: that have the layer.
    """

    cell: Cell
    counts: tuple[int, ...]
    timings: dict[str, tuple[float, float]]
    models: frozenset[str]


def read_table(path: Path) -> list[Measured]:
    """The cells of a table, top and below it apart."""
    found = []
    for name, record in read_records(path).items():
        cell = parse_cell(name)
        models = frozenset(m for m, shapes in MODELS.items() if (cell.n, cell.k) in shapes)
        for counts, timings in (((cell.bucket,), record.top), (cell.interior, record.interior)):
            times = {e: (t.seconds, t.speedup) for e, t in timings.items()}
            if times:
                found.append(Measured(cell, counts, times, models))
    return found


def read_rows(path: Path) -> list[Measured]:
    """The rows of a rule.json, each at a token count of its own."""
    if not path.exists():
        return []
    found = []
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        n, k, tokens, times = row["n"], row["k"], row["tokens"], row["us"]
        cell = Cell(n, k, choice.find_bucket(tokens), "bfloat16", False)
        timings = {
            executor: (us * 1e-6, times["dense"] / us)
            for executor, us in times.items()
            if executor != "dense"
        }
        found.append(Measured(cell, (tokens,), timings, frozenset({row["model"]})))
    return found


def parse_cell(name: str) -> Cell:
    """What `str(cell)` made the name from."""
    shape, bucket, dtype, bias = name.split()
    n, k = map(int, shape.split("x"))
    return Cell(n, k, int(bucket[1:]), dtype, bias == "bias")


def points(
    measured: Sequence[Measured], executor: str
) -> list[tuple[Cell, tuple[int, ...], float]]:
    """(cell, token counts, seconds at one of them) of an executor."""
    found = []
    for one in measured:
        if executor == "dense":
            # It was timed beside each candidate, below a range's end at the worst count of each.
            dense = statistics.median(seconds * gain for seconds, gain in one.timings.values())
            found.append((one.cell, one.counts, dense))
        elif executor in one.timings:
            found.append((one.cell, one.counts, one.timings[executor][0]))
    return found


def with_constants(executor: str, numbers: Sequence[float], multiprocessors: int) -> Constants:
    """Constants of one executor alone."""
    parts: dict[str, Any] = {name: START[name] for name in START} | {executor: tuple(numbers)}
    return Constants(
        multiprocessors, **parts, margin=1, margin_between=1, smallest=(0, 0, 0), algorithms=()
    )


def fit(
    executor: str, found: Sequence[tuple[Cell, tuple[int, ...], float]], multiprocessors: int
) -> tuple[list[float], float]:
    """The executor's constants, and the RMS of the logarithmic errors.

    Levenberg's and Marquardt's method on the logarithms of the constants, errors above a tenth
    counting less. Of several token counts the one that fits best is taken for the one measured.
    """

    def errors(logs: torch.Tensor) -> torch.Tensor:
        constants = with_constants(executor, logs.exp().tolist(), multiprocessors)
        values = []
        for cell, counts, seconds in found:
            ratios = (
                math.log(prediction.predict(executor, cell.n, cell.k, m, constants) / seconds)
                for m in counts
            )
            values.append(min(ratios, key=abs))
        return torch.tensor(values, dtype=torch.float64)

    def loss(values: torch.Tensor) -> float:
        size = values.abs()
        return torch.where(size < 0.1, size**2, 0.2 * size - 0.01).sum().item()

    logs = torch.tensor(START[executor], dtype=torch.float64).log()
    now, damping = errors(logs), 1e-2
    for _ in range(25):
        step = 1e-3
        columns = [
            (errors(logs + step * unit) - now) / step
            for unit in torch.eye(len(logs), dtype=torch.float64)
        ]
        weights = torch.where(now.abs() < 0.1, 1.0, 0.1 / now.abs().clamp_min(1e-9))
        jacobian = torch.stack(columns, 1)
        normal = jacobian.T @ (weights[:, None] * jacobian)
        gradient = jacobian.T @ (weights * now)
        before = loss(now)
        for _ in range(6):
            move = torch.linalg.solve(normal + damping * torch.eye(len(logs)).double(), -gradient)
            # A constant that nothing speaks for stays where it is, and none leaves its size.
            there = (logs + move.clamp(-0.7, 0.7)).clamp(-5, 9)
            then = errors(there)
            if loss(then) < before:
                logs, now, damping = there, then, damping / 3
                break
            damping *= 4
        else:
            break
        if before - loss(now) < 1e-5 * before:
            break
    return logs.exp().tolist(), now.square().mean().sqrt().item()


def fit_all(
    measured: Sequence[Measured], multiprocessors: int
) -> tuple[Constants, dict[str, float]]:
    """The constants without margins, and by executor the RMS of the logarithmic errors."""
    fitted, errors = {}, {}
    for executor in prediction.EXECUTORS:
        found = points(measured, executor)
        numbers, errors[executor] = fit(executor, found, multiprocessors)
        fitted[executor] = tuple(float(f"{number:.{ROUND}g}") for number in numbers)
    shapes = {(one.cell.n, one.cell.k) for one in measured}
    smallest = (
        min(n for n, _ in shapes),
        min(k for _, k in shapes) // 2,  # bytes and products do not change their law below
        min(n * k for n, k in shapes),
    )
    constants = Constants(
        multiprocessors, **fitted, margin=1.0, margin_between=1.0, smallest=smallest, algorithms=()
    )
    return constants, errors


def hold_out(
    measured: Sequence[Measured], multiprocessors: int
) -> list[tuple[Measured, Constants]]:
    """What was measured of each model, with the constants that all others give."""
    pairs = []
    for model in sorted(set().union(*(one.models for one in measured))):
        others = [one for one in measured if model not in one.models]
        constants, _ = fit_all(others, multiprocessors)
        pairs += [(one, constants) for one in measured if model in one.models]
    return pairs


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How choices compare with what was measured.

    Attributes:
        regret: geometric mean of the chosen time over the best measured.
        slower: share of the choices that are slower than SLOWEST of dense.
        speedup: geometric mean over dense.
        num: choices that were looked at.
    """

    regret: float
    slower: float
    speedup: float
    num: int


def judge(
    pairs: Sequence[tuple[Measured, Constants]],
    margins: tuple[float, float] | None = None,
    available: Collection[str] = ("dense", "decode", "prefill", "cusparselt", "unpack"),
) -> Verdict:
    """Looks up what the choice by prediction would have cost.

    Cells from before our kernels, which know neither, say nothing of it and are left out.

    Args:
        pairs: measurements, with the constants to predict them by.
        margins: in place of the constants' own.
        available: executors; without dense, the best of the others is what counts.
    """
    regrets, speedups = [], []
    for one, constants in pairs:
        if not one.timings.keys() & {"decode", "prefill"}:
            continue
        if margins is not None:
            constants = constants._replace(margin=margins[0], margin_between=margins[1])
        known = {name: gain for name, (_, gain) in one.timings.items() if name in available}
        if "dense" in available:
            known["dense"] = 1.0
        tokens = one.counts[0]
        chosen = choice.choose_unmeasured(tokens, known, one.cell, constants).candidate.executor
        regrets.append(math.log(max(known.values()) / known[chosen]))
        speedups.append(known[chosen])
    slower = sum(gain < SLOWEST for gain in speedups) / len(speedups)
    mean = math.exp(statistics.fmean(map(math.log, speedups)))
    return Verdict(math.exp(statistics.fmean(regrets)), slower, mean, len(speedups))


def choose_margins(pairs: Sequence[tuple[Measured, Constants]]) -> tuple[float, float]:
    """Those with the least regret of the pairs that keep SHARE; the largest where none does."""
    allowed = []
    for margins in itertools.product(MARGINS, MARGINS_BETWEEN):
        verdict = judge(pairs, margins)
        if verdict.slower <= SHARE:
            allowed.append((verdict.regret, margins))
    return min(allowed)[1] if allowed else (MARGINS[-1], MARGINS_BETWEEN[-1])


def best_algorithms(path: Path) -> tuple[int, ...]:
    """Algorithms of cuSPARSELt that won 2 % of a table's cells or more, the most frequent first."""
    count = Counter(
        timings["cusparselt"].candidate.algorithm
        for record in read_records(path).values()
        for timings in (record.top, record.interior)
        if "cusparselt" in timings
    )
    return tuple(a for a, times in count.most_common() if times >= 0.02 * count.total())


def measured_for(path: Path) -> list[Measured]:
    """Of a table's GPU: its cells, and the rows of a rule.json of the same card."""
    card = "h200" if "h200" in path.name else "h100"
    return read_table(path) + read_rows(ROOT / "benchmarks" / "results" / card / "rule.json")


def entry_of(constants: Constants, verdict: Verdict) -> dict[str, Any]:
    """As the table file has it, with what holding models out gave."""
    entry = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in constants._asdict().items()
    }
    figures = dataclasses.asdict(verdict)
    return {**entry, "held_out": {name: round(value, 4) for name, value in figures.items()}}


def main() -> None:
    """Fit, hold out, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", type=Path, default=sorted(TABLES.glob("*.json")))
    parser.add_argument("--multiprocessors", type=int, default=132, help="of the tables' GPU")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    for path in args.tables:
        measured = measured_for(path)
        most = args.multiprocessors
        if any(len(points(measured, name)) < FEWEST for name in prediction.EXECUTORS):
            print(f"{path.name}: too little was measured for a fit")
            continue
        constants, errors = fit_all(measured, most)
        pairs = hold_out(measured, most)
        margins = choose_margins(pairs)
        constants = constants._replace(
            margin=margins[0], margin_between=margins[1], algorithms=best_algorithms(path)
        )
        print(path.name, {name: f"{error:.1%}" for name, error in errors.items()}, constants)
        verdict = judge(pairs, margins)
        print("held out, dense at hand:", verdict)
        without = ("decode", "prefill", "cusparselt", "unpack")
        print("held out, without dense:", judge(pairs, margins, without))
        if not args.check:
            content = json.loads(path.read_text(encoding="utf-8"))
            head = {name: content[name] for name in ("format", "gpu", "cusparselt")}
            content.pop("model", None)
            content = {**head, "model": entry_of(constants, verdict), **content}
            path.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
