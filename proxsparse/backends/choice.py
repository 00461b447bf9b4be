"""Which executor a 2:4 linear layer runs on, per GPU, library, shape and token count: measured.

Five executors compute x W^T + bias: `dense` (cuBLAS on an unpacked weight that is held anyway),
`cusparselt`, `decode` and `prefill` (kernels of ours for few and for many tokens, where they were
built) and `unpack` (the dense weight made anew for the call). None is best everywhere, and a
library's algorithm can be slow or wrong. So candidates are measured beside dense, and one is used
in its place only if it

- agrees with a float32 product as well as dense does, and with itself, run after run,
- is at least MARGIN times as fast as dense.

That is decided for ranges of token counts, and for the upper end of a range by itself: kernels work
in tiles of 128 or 256 tokens, which a round count fills and the next one does not, so sparse often
wins at 4096 tokens and loses at 3073. Two counts stand for those below the end, and the worse of
them decides.

Everything is tried in a child process: one that crashes or hangs costs that candidate, not the run.
What was found is kept as JSON in the user's cache directory, one file per GPU and library version;
tables that ship with the package are read first. Where nothing was measured, `choose_by_rule` says
what runs.

This file knows nothing of how candidates run (`tuning_worker` does), so it is tested without a GPU.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from tqdm import tqdm

from proxsparse.errors import ProxsparseError

# Upper ends of the ranges of token counts: powers of two, from 128 with a step half-way because the
# number of tiles, and with it the winner, changes quickly there. 1 is decoding one sequence; more
# than the last count as the last.
BUCKETS = (
    *(1, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768),
    *(1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384),
)
EXECUTORS = ("dense", "cusparselt", "decode", "prefill", "unpack")
MARGIN = 1.03  # measured speed-up that a candidate needs to replace dense
NUM_FINALISTS = 3  # of each executor are measured with care: quick trials are noisy
# Below the upper end those are tried that come this close to the best one's speed-up there: a
# smaller tile loses less than that at the end, and may win below.
LEADERS_WITHIN = 0.75
LIBRARY_CHOICE = -1  # an algorithm id: the library's own default

# Where nothing was measured. On an H200 our kernel for many tokens beats dense from 1024 tokens on,
# at powers of two, for every shape that was measured but one (512 x 3584, 1024 tokens: 0.84), and
# in most cells the library's best algorithm. More than 64 tokens both multiply faster than the
# weight is unpacked.
RULE_BEATS_DENSE_FROM = 1024
RULE_BEATS_UNPACK_FROM = 65

_FORMAT = 2  # of the table files
_START_SECONDS = 180.0  # a child imports torch, starts CUDA and compiles kernels
_MEASURE_SECONDS = 60.0  # a candidate that takes longer hangs


class Candidate(NamedTuple):
    """An executor and how it runs; `algorithm` is cuSPARSELt's id, or a layout of our kernels."""

    executor: str
    algorithm: int = LIBRARY_CHOICE
    split_k: int = 1
    split_k_mode: int = 0

    def __str__(self) -> str:
        if self.executor == "cusparselt":
            return f"cusparselt {self.algorithm}/{self.split_k}/{self.split_k_mode}"
        return self.executor if self.algorithm < 0 else f"{self.executor} {self.algorithm}"


class Cell(NamedTuple):
    """What is measured at once: a layer's shape and a range of token counts.

    Attributes:
        n: output features.
        k: input features.
        bucket: the largest token count of the range, one of BUCKETS.
        dtype: e.g. "bfloat16".
        has_bias: whether a bias is added.
    """

    n: int
    k: int
    bucket: int
    dtype: str
    has_bias: bool

    @property
    def lowest(self) -> int:
        """The smallest token count of the range."""
        index = BUCKETS.index(self.bucket)
        return BUCKETS[index - 1] + 1 if index else 1

    @property
    def interior(self) -> tuple[int, ...]:
        """Token counts that stand for those below the bucket, the lowest first.

        The lowest is the worst for tiles. The one half-way fills no whole number of them, either;
        up to 64 tokens there is one tile or two, and the lowest alone will do.
        """
        if self.lowest == self.bucket:
            return ()
        if self.bucket <= 64:
            return (self.lowest,)
        return self.lowest, (self.lowest - 1 + self.bucket) // 2 + 24

    def __str__(self) -> str:
        bias = "bias" if self.has_bias else "no-bias"
        return f"{self.n}x{self.k} m{self.bucket} {self.dtype} {bias}"


class Timing(NamedTuple):
    """A verified candidate, timed beside dense.

    Attributes:
        candidate: what ran.
        seconds: of a call at the token count of `speedup`.
        speedup: over dense, the smallest of the token counts that were measured.
    """

    candidate: Candidate
    seconds: float
    speedup: float

    @property
    def is_faster_than_dense(self) -> bool:
        """By MARGIN."""
        return self.speedup >= MARGIN


class Record(NamedTuple):
    """What is known of a cell: the best candidate of each executor, and what must not be used.

    Attributes:
        top: executor -> its best where the token count is the bucket.
        interior: executor -> its best for the token counts below; empty where there are none.
        banned: candidate -> why.
    """

    top: dict[str, Timing]
    interior: dict[str, Timing]
    banned: dict[str, str]

    def timings(self, tokens: int) -> dict[str, Timing]:
        """What holds for a token count of the cell."""
        return self.top if tokens >= find_bucket(tokens) else self.interior


def find_bucket(tokens: int) -> int:
    """The bucket of a token count of at least 1; the last one for those above it."""
    return BUCKETS[min(bisect.bisect_left(BUCKETS, tokens), len(BUCKETS) - 1)]


def choose(record: Record | None, tokens: int, available: Collection[str]) -> Candidate:
    """What a call runs on.

    The answer is the same for all token counts between two buckets, and for those above the last
    bucket the same as at the last bucket.

    Args:
        record: measurements of its cell, if there are any.
        tokens: of the call.
        available: executors whose form of the weight is at hand; `unpack` always is.

    Returns:
        With the dense weight at hand, the fastest candidate that is faster than it by MARGIN, or
        dense; without, the fastest there is.
    """
    measured = {} if record is None else record.timings(tokens)
    timings = [timing for name, timing in measured.items() if name in available]
    if "dense" in available:
        if record is None:
            return choose_by_rule(tokens, available)
        timings = [timing for timing in timings if timing.is_faster_than_dense]
        if not timings:
            return Candidate("dense")
    elif not timings:
        return choose_by_rule(tokens, available)
    return max(timings, key=lambda timing: timing.speedup).candidate


def choose_by_rule(tokens: int, available: Collection[str]) -> Candidate:
    """What runs where nothing was measured: see the constants above for why.

    From 1024 tokens on our kernel for many, where it is available, or else cuSPARSELt with its
    default algorithm; with fewer the kernel for few tokens, or dense, if the dense weight is held.
    If it is not, the kernel for many or else cuSPARSELt from 65 tokens on, and the weight unpacked
    for the call where nothing else can run.

    This promises nothing: both may lose to dense for narrow layers, and for token counts that are
    no multiples of 128, above all the smaller ones. Tuning finds out.
    """
    has_dense = "dense" in available
    sparse_from = RULE_BEATS_DENSE_FROM if has_dense else RULE_BEATS_UNPACK_FROM
    for name in ("prefill", "cusparselt") if tokens >= sparse_from else ():
        if name in available:
            return Candidate(name)
    if "decode" in available:
        return Candidate("decode")
    return Candidate("dense" if has_dense else "unpack")


# -- the table
# -----------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Where tables are kept: $PROXSPARSE_CACHE, or proxsparse in the user's cache directory."""
    own = os.environ.get("PROXSPARSE_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "proxsparse"


class Table:
    """Records by cell, and bans by dtype, for one GPU model and one cuSPARSELt version.

    A candidate that crashed or hung is banned for its dtype everywhere; one that was wrong, in its
    cell.

    Attributes:
        gpu: the GPU's name.
        library: version of cuSPARSELt.
        path: the user's file.
    """

    def __init__(self, gpu: str, library: str) -> None:
        self.gpu, self.library = gpu, library
        slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        name = f"{slug}-cusparselt-{library}.json"
        self.path = cache_directory() / name
        self._records: dict[str, Record] = {}
        self._banned: dict[str, str] = {}
        for path in (Path(__file__).with_name("tables") / name, self.path):
            records, banned = _read_table(path)
            self._records |= records
            self._banned |= banned
        # What this process found: alone written, so that a newer table that ships is not hidden
        # under a copy of an older one.
        self._own: tuple[dict[str, Record], dict[str, str]] = {}, {}

    def __len__(self) -> int:
        return len(self._records)

    def get(self, cell: Cell) -> Record | None:
        """What is known of the cell."""
        return self._records.get(str(cell))

    def put(self, cell: Cell, record: Record) -> None:
        """Keeps what was found; `save` writes it."""
        self._records[str(cell)] = self._own[0][str(cell)] = record

    def ban(self, dtype: str, candidate: Candidate, reason: str) -> None:
        """Never tries the candidate again for this dtype."""
        name = f"{dtype} {candidate}"
        self._banned[name] = self._own[1][name] = reason

    def ban_reason(self, dtype: str, candidate: Candidate) -> str:
        """Why the candidate is banned for the dtype; empty if it is not."""
        return self._banned.get(f"{dtype} {candidate}", "")

    def save(self) -> None:
        """Writes the user's file: what others wrote since is kept, and no reader sees half a file.

        Raises:
            ProxsparseError: the directory cannot be written.
        """
        import fcntl  # absent on Windows, as is the backend that this table is for

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                records, banned = _read_table(self.path)
                records |= self._own[0]
                banned |= self._own[1]
                self._write(records, banned)
        except OSError as error:
            raise ProxsparseError(
                f"the tuning table {self.path} cannot be written ({error}): name another directory "
                "in PROXSPARSE_CACHE"
            ) from error
        self._records |= records
        self._banned |= banned

    def _write(self, records: dict[str, Record], banned: dict[str, str]) -> None:
        content = {
            "format": _FORMAT,
            "gpu": self.gpu,
            "cusparselt": self.library,
            "banned": dict(sorted(banned.items())),
            "cells": {name: _record_json(records[name]) for name in sorted(records)},
        }
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, self.path)


def _read_table(path: Path) -> tuple[dict[str, Record], dict[str, str]]:
    """A file's records and bans; none of a file that is not there, or damaged (with a warning)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']}, not {_FORMAT}")
        records = {name: _parse_record(entry) for name, entry in content["cells"].items()}
        return records, {str(name): str(reason) for name, reason in content["banned"].items()}
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"the tuning table {path} is ignored: it cannot be read ({error!r}); the next tuning "
            "run writes it anew",
            stacklevel=3,
        )
        return {}, {}


def _record_json(record: Record) -> dict[str, Any]:
    def best(timings: dict[str, Timing]) -> dict[str, Any]:
        return {
            name: {**t.candidate._asdict(), **t._asdict(), "candidate": str(t.candidate)}
            for name, t in timings.items()
        }

    return record._asdict() | {"top": best(record.top), "interior": best(record.interior)}


def _parse_record(entry: dict[str, Any]) -> Record:
    def best(entries: dict[str, Any]) -> dict[str, Timing]:
        timings = {}
        for name, fields in entries.items():
            if name not in EXECUTORS:
                raise ValueError(f"unknown executor {name!r}")
            numbers = [int(fields[field]) for field in Candidate._fields[1:]]
            measured = [float(fields[field]) for field in Timing._fields[1:]]
            timings[name] = Timing(Candidate(name, *numbers), *measured)
        return timings

    banned = {str(candidate): str(reason) for candidate, reason in entry["banned"].items()}
    return Record(best(entry["top"]), best(entry["interior"]), banned)


@functools.cache
def table_for(device: int) -> Table:
    """The table of a CUDA device and the loaded library, read once per process.

    Raises:
        ImportError: the CUDA extension was not built.
        ProxsparseError: cuSPARSELt cannot be loaded.
    """
    from proxsparse.backends import cusparselt

    return Table(torch.cuda.get_device_name(device), cusparselt.library().version_text)


def known_speedups(
    table: Table,
    n: int,
    k: int,
    dtype: torch.dtype,
    has_bias: bool,
    tokens: Iterable[int],
    available: Collection[str],
) -> dict[int, float]:
    """Token count -> measured speed-up over dense of what a layer runs on there; gaps left out.

    Between two buckets it is the smallest of those measured there.

    Args:
        table: of the layer's GPU.
        n: output features.
        k: input features.
        dtype: of weight and activations.
        has_bias: whether a bias is added.
        tokens: counts of interest.
        available: executors whose form of the weight the layer keeps.
    """
    name = str(dtype).removeprefix("torch.")
    known = {}
    for count in tokens:
        record = table.get(Cell(n, k, find_bucket(count), name, has_bias))
        if record is None:
            continue
        chosen = choose(record, count, available)
        timing = record.timings(count).get(chosen.executor)
        if chosen.executor == "dense":
            known[count] = 1.0
        elif timing is not None:
            known[count] = timing.speedup
    return known


# What the backend has decided, by its own keys; emptied when a table changes, and the generation
# counts how often that was.
decisions: dict[Any, Any] = {}
generation = 0

# -- measuring
# -----------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What came of trying a candidate.

    Attributes:
        kind: "ok"; "wrong" (its numbers); "refused" (by the library: not for these shapes);
            "crashed"; "hung"; "memory" (too little) and "failed" (an error elsewhere), which are
            not held against the candidate.
        detail: why, unless ok.
        seconds: of a call; 0 unless ok.
        speedup: over dense; 0 unless ok.
    """

    kind: str
    detail: str = ""
    seconds: float = 0.0
    speedup: float = 0.0


class Unmeasurable(Exception):
    """No candidate of this cell can be tried; the text says why."""


class Worker(Protocol):
    """Something that can try candidates; `ChildWorker`, or a test's stand-in."""

    def candidates(self, cell: Cell) -> list[Candidate]:
        """What there is to try, without split-K variants; raises Unmeasurable."""
        ...

    def measure(self, cell: Cell, candidate: Candidate, tokens: int, is_final: bool) -> Outcome:
        """Verifies and times at one token count of the cell: quickly, or finally, with care."""
        ...


@dataclasses.dataclass
class Report:
    """What a tuning run did.

    Attributes:
        num_measured: cells that were measured.
        num_known: cells that were in the table already.
        num_late: cells that the deadline left to the rule.
        problems: cells that could not be measured, and why.
        banned: candidates that must not be used, by cell or dtype, and why.
    """

    num_measured: int = 0
    num_known: int = 0
    num_late: int = 0
    problems: dict[str, str] = dataclasses.field(default_factory=dict)
    banned: dict[str, str] = dataclasses.field(default_factory=dict)


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
) -> Report:
    """Measures the cells that the table lacks, and saves it after each.

    Args:
        table: is extended and saved.
        cells: to measure.
        worker: tries the candidates.
        seconds: no trial starts after this many; the cells left over stay with the rule, and the
            cell under way is not kept. One trial may overrun by its own time limit.
        clock: a monotonic clock in seconds.
        show_progress: a progress bar on stderr.

    Returns:
        What was measured, banned and left out.
    """
    report = Report()
    cells = list(dict.fromkeys(cells))
    deadline = clock() + seconds
    bar = tqdm(cells, desc="tuning", unit="cell", disable=not show_progress, leave=False)
    for done, cell in enumerate(bar):
        bar.set_postfix_str(str(cell))
        if table.get(cell) is not None:
            report.num_known += 1
            continue

        def measure(
            candidate: Candidate, tokens: int, is_final: bool, cell: Cell = cell
        ) -> Outcome:
            if clock() >= deadline:
                raise _DeadlinePassed
            return _measure(table, cell, candidate, tokens, is_final, worker, report)

        try:
            if clock() >= deadline:
                raise _DeadlinePassed
            record = _Search(cell, measure).run(worker.candidates(cell))
        except _DeadlinePassed:
            report.num_late = sum(table.get(late) is None for late in cells[done:])
            report.num_known += len(cells) - done - report.num_late
            break
        except Unmeasurable as error:
            report.problems[str(cell)] = str(error)
            continue
        report.banned |= {f"{cell}: {name}": reason for name, reason in record.banned.items()}
        report.num_measured += 1
        table.put(cell, record)
        table.save()
    table.save()  # the bans of a cell that was not finished
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


class _Search:
    """Looks for the best candidates of one cell.

    All have a quick trial at the bucket, and the leaders another at the lowest token count; the
    first of either ranking are measured with care, and the best of those is kept.
    """

    def __init__(self, cell: Cell, measure: Callable[[Candidate, int, bool], Outcome]) -> None:
        self._cell, self._measure = cell, measure
        self._banned: dict[str, str] = {}
        # Wrong or fatal at one token count, and so not trusted at the others.
        self._unfit: set[Candidate] = set()

    def run(self, candidates: Iterable[Candidate]) -> Record:
        """What is found; raises Unmeasurable where the failure is no candidate's."""
        cell = self._cell
        quick = self._try_all(candidates, cell.bucket)
        best = self._rank(quick, "cusparselt")[:2]
        quick |= self._try_all(split_variants(cell, best), cell.bucket)
        below: list[Timing] = []
        if cell.interior:
            fastest = {c.executor: quick[c] for c in sorted(quick, key=lambda c: quick[c])}
            leaders = [c for c in quick if quick[c] >= LEADERS_WITHIN * fastest[c.executor]]
            below = self._finalists(self._try_all(leaders, cell.lowest), cell.interior)
        top = self._finalists(quick, (cell.bucket,))
        return Record(self._best(top), self._best(below), self._banned)

    def _attempt(self, candidate: Candidate, tokens: int, is_final: bool) -> Outcome:
        outcome = self._measure(candidate, tokens, is_final)
        if outcome.kind in ("memory", "failed"):
            raise Unmeasurable(f"{candidate}: {outcome.detail}")
        if outcome.kind in ("wrong", "crashed", "hung"):
            self._unfit.add(candidate)
        if outcome.kind == "wrong":
            self._banned[str(candidate)] = outcome.detail
        return outcome

    def _try_all(self, candidates: Iterable[Candidate], tokens: int) -> dict[Candidate, float]:
        """The speed-ups of those that work, by quick trials."""
        outcomes = {candidate: self._attempt(candidate, tokens, False) for candidate in candidates}
        return {c: outcome.speedup for c, outcome in outcomes.items() if outcome.kind == "ok"}

    def _rank(self, quick: dict[Candidate, float], executor: str) -> list[Candidate]:
        ranked = sorted(quick, key=lambda candidate: -quick[candidate])
        return [c for c in ranked if c.executor == executor and c not in self._unfit]

    def _finalists(self, quick: dict[Candidate, float], counts: Sequence[int]) -> list[Timing]:
        """The first of each executor, each as fast as at the worst of the token counts."""
        finalists: list[Timing] = []
        for executor in dict.fromkeys(candidate.executor for candidate in quick):
            timings = self._time_with_care(self._rank(quick, executor), counts)
            finalists += itertools.islice(timings, NUM_FINALISTS)
        return finalists

    def _time_with_care(
        self, candidates: Iterable[Candidate], counts: Sequence[int]
    ) -> Iterator[Timing]:
        for candidate in candidates:
            outcomes = [self._attempt(candidate, tokens, True) for tokens in counts]
            if all(outcome.kind == "ok" for outcome in outcomes):
                worst = min(outcomes, key=lambda outcome: outcome.speedup)
                yield Timing(candidate, worst.seconds, worst.speedup)

    def _best(self, finalists: Iterable[Timing]) -> dict[str, Timing]:
        fit = [timing for timing in finalists if timing.candidate not in self._unfit]
        fit.sort(key=lambda timing: timing.speedup)
        return {timing.candidate.executor: timing for timing in fit}  # the last of each stays


def split_variants(cell: Cell, best: Iterable[Candidate]) -> list[Candidate]:
    """The same algorithms with the sum over K split: into parts, or by segments.

    Splitting into 2, 4 or 8, with one kernel or two (mode 1 or 2), fills a GPU that has too few
    tiles, so only cells of up to 1024 tokens try it. Segment-K (-1) can hang for small N and is not
    tried below 512.
    """
    splits = []
    if cell.bucket <= 1024:
        splits += [(parts, mode) for parts in (2, 4, 8) for mode in (1, 2)]
    if cell.n >= 512:
        splits.append((-1, 0))
    return [
        candidate._replace(split_k=parts, split_k_mode=mode)
        for candidate in best
        for parts, mode in splits
    ]


# -- the child process
# ---------------------------------------------------------------------------


class _ChildFailed(Exception):
    """The child crashed or hung while it answered."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class ChildWorker:
    """Tries candidates in a child process, and starts a new one when that dies or hangs.

    The child reads requests and writes answers, a JSON object a line; its first line says that it
    is ready. What else it has to say goes to stderr, whose end is quoted when it crashes.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str] | None = None,
        start_seconds: float = _START_SECONDS,
        measure_seconds: float = _MEASURE_SECONDS,
    ) -> None:
        self._command = list(command)
        self._environment = environment
        self._start_seconds, self._measure_seconds = start_seconds, measure_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._unread = b""

    def __enter__(self) -> ChildWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._stderr.close()

    def candidates(self, cell: Cell) -> list[Candidate]:
        """What the child can try for the cell.

        Raises:
            Unmeasurable: the child cannot start, lacks memory or fails to set the cell up.
        """
        try:
            answer = self._ask({"do": "candidates", "cell": cell}, self._measure_seconds)
        except _ChildFailed as error:
            raise Unmeasurable(f"the tuning process {error.kind}: {error}") from error
        if "problem" in answer:
            raise Unmeasurable(answer["problem"])
        return [Candidate(*fields) for fields in answer["candidates"]]

    def measure(self, cell: Cell, candidate: Candidate, tokens: int, is_final: bool) -> Outcome:
        """The child's verdict, or that it did not survive it."""
        request = {
            "do": "measure",
            "cell": cell,
            "candidate": candidate,
            "tokens": tokens,
            "final": is_final,
        }
        try:
            if self._process is None:  # the last trial broke it
                self._start()
        except _ChildFailed as error:
            raise Unmeasurable(f"the tuning process {error.kind}: {error}") from error
        try:
            return Outcome(**self._ask(request, self._measure_seconds))
        except _ChildFailed as error:
            return Outcome(error.kind, str(error))

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._crash() from None
        return self._answer(seconds)

    def _start(self) -> None:
        self._stderr.seek(0)
        self._stderr.truncate()
        self._unread = b""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=self._environment,
        )
        self._answer(self._start_seconds)

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next line of the child, waited for at most this long."""
        assert self._process is not None and self._process.stdout is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._unread:
            ready, _, _ = select.select(
                [self._process.stdout], [], [], max(0.0, end - time.monotonic())
            )
            if not ready:
                self._stop()
                raise _ChildFailed("hung", f"no answer within {seconds:.0f} s")
            received = os.read(self._process.stdout.fileno(), 1 << 16)
            if not received:
                raise self._crash()
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _crash(self) -> _ChildFailed:
        assert self._process is not None
        code = self._stop()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return _ChildFailed("crashed", f"exit code {code}: {lines[-1] if lines else 'no message'}")

    def _stop(self) -> int | None:
        """Ends the child, by force if need be, and returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:  # it died with a request half written
                continue
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
        try:
            return process.wait(timeout=30)
        except subprocess.TimeoutExpired:  # stuck in the driver: nothing else can end it
            return None


def tune_layers(
    layers: Iterable[tuple[int, int, bool]],
    tokens: Iterable[int] = BUCKETS,
    *,
    dtype: torch.dtype,
    device: int = 0,
    seconds: float = 600.0,
    show_progress: bool = True,
) -> Report:
    """Measures layers on a GPU and keeps the result for this and later processes.

    Args:
        layers: (n, k, has_bias) of each.
        tokens: counts whose buckets to measure.
        dtype: of weights and activations, bfloat16 or float16.
        device: index of the CUDA device; other work on it disturbs the timing.
        seconds: the deadline, see `tune`.
        show_progress: a progress bar on stderr.

    Raises:
        ImportError: the CUDA extension was not built.
        ProxsparseError: cuSPARSELt cannot be loaded, or the table cannot be written.
    """
    from proxsparse.backends import cusparselt

    name = str(dtype).removeprefix("torch.")
    buckets = sorted({find_bucket(count) for count in tokens})
    cells = [Cell(n, k, bucket, name, bias) for n, k, bias in layers for bucket in buckets]
    command = [sys.executable, "-m", "proxsparse.tuning.trials", str(device)]
    environment = {**os.environ, cusparselt.VARIABLE: cusparselt.library().path}
    if not os.path.isabs(cusparselt.library().path):  # the system's loader found it by name
        del environment[cusparselt.VARIABLE]
    with ChildWorker(command, environment) as worker:
        report = tune(
            table_for(device), cells, worker, seconds=seconds, show_progress=show_progress
        )
    forget_decisions()
    return report


def forget_decisions() -> None:
    """Let everything be decided anew, by what the tables hold now."""
    global generation
    decisions.clear()
    generation += 1
