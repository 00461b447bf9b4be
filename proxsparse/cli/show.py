"""Tables and lines of results, readable at 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import filesize
from rich.console import Console
from rich.table import Table

from proxsparse.progress import duration

_FEW = 8  # layers that are shown without --verbose


def line(console: Console, text: str) -> None:
    """A line as it is."""
    console.print(text, markup=False, highlight=False)


def columns(*names: str) -> Table:
    """A table with names at the left and figures at the right, nothing cut off."""
    table = Table()
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    return table


def layers(
    console: Console, table: Table, rows: Sequence[tuple[str, ...]], verbose: bool, note: str = ""
) -> None:
    """A table with a row for each layer: without `verbose` the first and the last of many."""
    names = _shortened([row[0] for row in rows])
    rows = [(name, *row[1:]) for name, row in zip(names, rows, strict=True)]
    if verbose or len(rows) <= _FEW:
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    half = _FEW // 2
    for row in rows[:half]:
        table.add_row(*row)
    table.add_row(f"... {len(rows) - _FEW} more (-v)", *[""] * (len(rows[0]) - 1))
    for row in rows[-half:]:
        table.add_row(*row)
    console.print(table)
    if note:
        line(console, note)


def _shortened(names: list[str]) -> list[str]:
    """Names without the parts at the beginning that all of them share."""
    parts = [name.split(".") for name in names]
    shared = 0
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return [".".join(part[shared:]) for part in parts] if len(names) > 1 else names


def left_dense(console: Console, reasons: Mapping[str, str], verbose: bool) -> None:
    """What stays dense: each weight, or without `verbose` how many of the same reason."""
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name)
    for reason, names in grouped.items():
        shown = names if verbose else names[:3]
        more = f" and {len(names) - len(shown)} more (-v)" if len(names) > len(shown) else ""
        line(console, f"left dense: {', '.join(shown)}{more} ({reason})")


def shape(sides: Sequence[int]) -> str:
    """The shape of a weight, e.g. 192x512."""
    return "x".join(map(str, sides))


def size(num_bytes: int) -> str:
    """Bytes in the unit that suits them, e.g. 13.5 GB."""
    return filesize.decimal(num_bytes)


def or_dash(value: float | None, form: str) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def figures(results: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    """Of models evaluated side by side, a row for each figure and a column for each model."""
    rows: dict[str, dict[str, str]] = {}
    for model, result in results.items():
        for name, value in _flat(result):
            rows.setdefault(name, {})[model] = value
    table = columns("", *results)
    for name, values in rows.items():
        table.add_row(name, *(values.get(model, "-") for model in results))
    if rows:
        yield table


def _flat(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"):
        if name in result:
            yield name.replace("_", " "), f"{result[name]:.4f}"
    for task, found in result.get("tasks", {}).items():
        for metric, value in found.items():
            kind = metric.partition(",")[0]
            if kind.endswith(("_stderr", "_len")) or not isinstance(value, int | float):
                continue
            error = found.get(metric.replace(kind, f"{kind}_stderr", 1))
            with_error = f" ± {error:.4f}" if isinstance(error, float) and error == error else ""
            yield f"{task} {kind}", f"{value:.4f}{with_error}"


def quality(console: Console, report: Mapping[str, Any]) -> None:
    """What pruning cost, or why that was not measured."""
    found = report.get("quality")
    if found:
        before, after = found["perplexity_dense"], found["perplexity"]
        table = columns("held-out text", "dense", "pruned", "change")
        table.add_row("perplexity", f"{before:.2f}", f"{after:.2f}", f"{after / before - 1:+.1%}")
        console.print(table)
        line(console, f"on {found['tokens']:,} tokens of {found['source']}, not calibrated on")
    elif report.get("quality_not_measured"):
        line(console, f"quality was not measured: {report['quality_not_measured']}")


def plan(console: Console, plan: Mapping[str, Any], verbose: bool) -> None:
    """What a job would do."""
    table = columns("layer", "shape", "weights")
    rows = [
        (row["name"], shape(row["shape"]), f"{math.prod(row['shape']):,}") for row in plan["layers"]
    ]
    layers(console, table, rows, verbose)
    left_dense(console, plan["left_dense"], verbose)
    line(
        console,
        f"{plan['recipe']['method']} would prune {len(rows)} layers, {plan['pruned_weights']:,} of "
        f"{plan['weights']:,} weights, on {plan['device']}",
    )
    if plan["tokens"]:
        line(
            console,
            f"calibration: {plan['samples']:,} blocks, {plan['tokens']:,} tokens from "
            f"{plan['recipe']['calibration']}",
        )
    line(console, f"the result takes {size(plan['output_bytes'])} on the disk")
    if plan["seconds"] is not None:
        line(
            console,
            f"estimated time: at least {duration(plan['seconds'])} ({plan['seconds_from']})",
        )


def backends(console: Console, ops: Mapping[str, Mapping[str, str]]) -> None:
    """Which backend has which op; each reason why one has not, once."""
    names = list(next(iter(ops.values())))
    table = columns("op", *names)
    reasons: dict[str, list[str]] = {}
    for op, found in ops.items():
        table.add_row(op, *("yes" if text == "yes" else "-" for text in found.values()))
        for name, text in found.items():
            if text != "yes":
                reasons.setdefault(f"{name}: {text.removeprefix('no: ')}", []).append(op)
    console.print(table)
    for reason, without in reasons.items():
        of_all = "" if len(without) == len(ops) else f" ({', '.join(without)})"
        line(console, f"- {reason}{of_all}")
