"""Measures the cells that a table lacks, within a deadline, and reports what came of it."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from proxsparse.backends.choice import BUCKETS, Candidate, Cell, find_bucket
from proxsparse.backends.table import Table, forget_decisions, table_for
from proxsparse.progress import Progress
from proxsparse.tuning.child_process import ChildWorker
from proxsparse.tuning.search import (
    Outcome,
    Search,
    Unmeasurable,
    Worker,
    prune,
    segment_variants,
)


@dataclasses.dataclass
class Report:
    """What a tuning run did.

    Attributes:
        num_measured: cells that were measured.
        num_known: cells that were in the table already.
        num_late: cells that the deadline left to predictions.
        problems: cells that could not be measured, and why.
        banned: candidates that must not be used, by cell or dtype, and why.
        late: names of the cells that the deadline left.
        seconds: that it took.
    """

    num_measured: int = 0
    num_known: int = 0
    num_late: int = 0
    problems: dict[str, str] = dataclasses.field(default_factory=dict)
    banned: dict[str, str] = dataclasses.field(default_factory=dict)
    late: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


# A cell and its candidates -> those that are tried.
Prune = Callable[[Cell, Sequence[Candidate]], list[Candidate]]


class _DeadlinePassed(Exception):
    pass


def tune(
    table: Table,
    cells: Iterable[Cell],
    worker: Worker,
    *,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    show_progress: bool = True,
    prune: Prune | None = None,
) -> Report:
    """Measures the cells that the table lacks, and saves it after each.

    Args:
        table: is extended and saved.
        cells: to measure.
        worker: tries the candidates.
        seconds: no trial starts after this many; the cells left over stay with predictions, and the
            cell under way is not kept. One trial may overrun by its own time limit.
        clock: a monotonic clock in seconds.
        show_progress: a progress bar on stderr, with what is left of the time.
        prune: leaves those of a cell's candidates that are tried; all, if it is not given.

    Returns:
        What was measured, banned and left out.
    """
    report = Report()
    cells = list(dict.fromkeys(cells))
    unknown = [cell for cell in cells if table.get(cell) is None]
    report.num_known = len(cells) - len(unknown)
    began = clock()
    deadline = began + seconds
    with Progress("tuning", len(unknown), unit="cell", is_hidden=not show_progress) as bar:
        for done, cell in enumerate(unknown):
            failed = {"failed": str(len(report.problems))} if report.problems else {}
            bar.update(min(done, 1), at=str(cell), **failed)

            def measure(
                candidate: Candidate, tokens: int, is_final: bool, cell: Cell = cell
            ) -> Outcome:
                if clock() >= deadline:
                    raise _DeadlinePassed
                return _measure(table, cell, candidate, tokens, is_final, worker, report)

            try:
                if clock() >= deadline:
                    raise _DeadlinePassed
                candidates = worker.candidates(cell)
                if prune is None:
                    record = Search(cell, measure).run(candidates)
                else:
                    record = Search(cell, measure, segment_variants).run(prune(cell, candidates))
            except _DeadlinePassed:
                report.late = [str(late) for late in unknown[done:]]
                report.num_late = len(report.late)
                break
            except Unmeasurable as error:
                report.problems[str(cell)] = str(error)
                continue
            report.banned |= {f"{cell}: {name}": reason for name, reason in record.banned.items()}
            report.num_measured += 1
            table.put(cell, record)
            table.save()
    table.save()  # the bans of a cell that was not finished
    report.seconds = clock() - began
    return report


def _measure(
    table: Table,
    cell: Cell,
    candidate: Candidate,
    tokens: int,
    is_final: bool,
    worker: Worker,
    report: Report,
) -> Outcome:
    """Tries one candidate unless it is banned for the dtype; bans it if it breaks the child."""
    reason = table.ban_reason(cell.dtype, candidate)
    if reason:
        return Outcome("refused", reason)
    outcome = worker.measure(cell, candidate, tokens, is_final)
    if outcome.kind in ("crashed", "hung"):
        reason = f"{outcome.kind} at {tokens} tokens of {cell}: {outcome.detail}"
        table.ban(cell.dtype, candidate, reason)
        report.banned[f"{cell.dtype} {candidate}"] = reason
    return outcome


def tune_layers(
    layers: Iterable[tuple[int, int, bool]],
    tokens: Iterable[int] = BUCKETS,
    *,
    dtype: torch.dtype,
    device: int = 0,
    seconds: float = 600.0,
    show_progress: bool = True,
    is_exhaustive: bool = False,
) -> Report:
    """Measures layers on a GPU and keeps the result for this and later processes.

    Args:
        layers: (n, k, has_bias) of each.
        tokens: counts whose buckets to measure.
        dtype: of weights and activations, bfloat16 or float16.
        device: index of the CUDA device; other work on it disturbs the timing.
        seconds: the deadline, see `tune`.
        show_progress: a progress bar on stderr.
        is_exhaustive: tries every candidate, also those that are predicted to be slow: some 100
            trials a cell instead of 20.

    Raises:
        ImportError: the CUDA extension was not built.
        ProxsparseError: cuSPARSELt cannot be loaded, or the table cannot be written.
    """
    from proxsparse.backends import cusparselt, executors

    name = str(dtype).removeprefix("torch.")
    buckets = sorted({find_bucket(count) for count in tokens})
    cells = [Cell(n, k, bucket, name, bias) for n, k, bias in layers for bucket in buckets]
    command = [sys.executable, "-m", "proxsparse.tuning.trials", str(device)]
    environment = {**os.environ, cusparselt.VARIABLE: cusparselt.library().path}
    if not os.path.isabs(cusparselt.library().path):  # the system's loader found it by name
        del environment[cusparselt.VARIABLE]
    table = table_for(device)
    layouts = {"decode": executors.DECODE_LAYOUTS, "prefill": executors.PREFILL_LAYOUTS}
    constants = None if is_exhaustive else table.constants

    def prune_cell(cell: Cell, candidates: Sequence[Candidate]) -> list[Candidate]:
        return prune(cell, candidates, constants, layouts)

    with ChildWorker(command, environment) as worker:
        report = tune(
            *(table, cells, worker),
            seconds=seconds,
            show_progress=show_progress,
            prune=None if constants is None else prune_cell,
        )
    forget_decisions()
    return report
