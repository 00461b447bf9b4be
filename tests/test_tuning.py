"""What a sparse layer runs on: choosing, measuring, banning, the table on disk. Needs no GPU."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from proxsparse.backends import choice
from proxsparse.backends import table as tables
from proxsparse.backends.choice import BUCKETS, Candidate, Cell, Record, Timing
from proxsparse.backends.table import Table
from proxsparse.errors import ProxsparseError
from proxsparse.tuning import search
from proxsparse.tuning import tune as tuning
from proxsparse.tuning.child_process import ChildWorker
from proxsparse.tuning.search import Outcome

CELL = Cell(4096, 4096, 1024, "bfloat16", False)
ALL = ("dense", "cusparselt", "unpack")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROXSPARSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def table() -> Table:
    return Table("NVIDIA H200", "0.8.1")


def library(algorithm: int, split_k: int = 1, mode: int = 0) -> Candidate:
    return Candidate("cusparselt", algorithm, split_k, mode)


def record(**speedups: tuple[float, float]) -> Record:
    """By executor the speed-ups at the top and below it."""
    top, interior = (
        {name: Timing(Candidate(name), 1e-5, both[part]) for name, both in speedups.items()}
        for part in (0, 1)
    )
    return Record(top, interior, {})


class FakeWorker:
    """Speed-ups or outcomes by candidate; what it has not heard of is refused.

    A function is called with the token count and whether the trial is final.
    """

    def __init__(
        self,
        outcomes: dict[Candidate, float | Outcome | Callable[[int, bool], float | Outcome]],
    ) -> None:
        self.outcomes = outcomes
        self.tried: list[tuple[Candidate, int, bool]] = []

    def candidates(self, cell: Cell) -> list[Candidate]:
        return [c for c in self.outcomes if c.split_k == 1]

    def measure(self, cell: Cell, candidate: Candidate, tokens: int, is_final: bool) -> Outcome:
        assert tokens in (cell.bucket, *cell.interior)
        self.tried.append((candidate, tokens, is_final))
        outcome = self.outcomes.get(candidate, Outcome("refused", "unheard of"))
        if callable(outcome):
            outcome = outcome(tokens, is_final)
        if isinstance(outcome, Outcome):
            return outcome
        return Outcome("ok", "", 1e-5 / outcome, outcome)


def at_top(top: float, below: float) -> Callable[[int, bool], float]:
    """A speed-up at CELL's bucket, and another at the counts below."""
    return lambda tokens, _: top if tokens == CELL.bucket else below


def tune(worker: search.Worker, *cells: Cell, into: Table | None = None) -> tuning.Report:
    into = table() if into is None else into
    return tuning.tune(into, cells or (CELL,), worker, seconds=60, show_progress=False)


# -- buckets and choice


def test_buckets_are_ranges_without_gaps() -> None:
    assert list(BUCKETS) == sorted(set(BUCKETS))
    assert all(bucket == 1 or bucket % 8 == 0 for bucket in BUCKETS)
    for tokens in range(1, BUCKETS[-1] + 1, 7):
        cell = CELL._replace(bucket=choice.find_bucket(tokens))
        assert cell.lowest <= tokens <= cell.bucket
    assert choice.find_bucket(10**6) == BUCKETS[-1]


def test_the_counts_that_stand_for_a_range_lie_in_it_and_fill_no_tiles() -> None:
    for bucket in BUCKETS:
        cell = CELL._replace(bucket=bucket)
        assert all(choice.find_bucket(tokens) == bucket > tokens for tokens in cell.interior)
        assert cell.interior[:1] == ((cell.lowest,) if bucket > 1 else ())
        middle = cell.interior[1:]
        assert len(middle) == (bucket >= 128)
        assert all(tokens % 8 == 0 and tokens % 128 for tokens in middle)


@pytest.mark.parametrize(
    ("tokens", "available", "expected"),
    [
        (16, ALL, "dense"),
        (1024, ALL, "dense"),
        (1024, ("dense", "unpack"), "dense"),
        (16384, ("unpack",), "unpack"),
        (16, (*ALL, "decode"), "decode"),
        (17, (*ALL, "decode"), "decode"),
        (17, ("cusparselt", "decode", "unpack"), "decode"),
        (64, ("cusparselt", "unpack"), "unpack"),
        (65, ("cusparselt", "unpack"), "cusparselt"),
        (65, ("cusparselt", "prefill", "unpack"), "prefill"),
        (1024, ("cusparselt", "prefill", "unpack"), "prefill"),
        (1024, ("prefill", "unpack"), "prefill"),
        (1023, (*ALL, "prefill"), "dense"),
        (1024, (*ALL, "prefill"), "prefill"),
        (1024, ("dense", "prefill", "unpack"), "prefill"),
    ],
)
def test_the_rule_where_nothing_was_measured_or_predicted(
    tokens: int, available: tuple[str, ...], expected: str
) -> None:
    cell = CELL._replace(bucket=choice.find_bucket(tokens))
    assert choice.choose(None, tokens, available, cell).candidate == Candidate(expected)
    small = choice.choose(None, tokens, available, cell._replace(n=1024)).candidate
    assert small == Candidate("dense" if "dense" in available else expected)


@pytest.mark.parametrize(
    ("speedups", "at_bucket", "below"),
    [
        ((1.5, 1.4), "cusparselt", "cusparselt"),
        ((1.02, 1.02), "dense", "dense"),  # within the margin
        ((1.43, 0.997), "cusparselt", "dense"),
        ((0.9, 1.6), "dense", "cusparselt"),
    ],
)
def test_dense_is_replaced_only_where_something_is_faster(
    speedups: tuple[float, float], at_bucket: str, below: str
) -> None:
    known = record(cusparselt=speedups, unpack=(0.5, 0.5))
    assert choice.choose(known, 1024, ALL).candidate.executor == at_bucket
    for tokens in (769, 800, 1023):
        assert choice.choose(known, tokens, ALL).candidate.executor == below
    assert choice.choose(known, 10**6, ALL).candidate.executor == at_bucket, "above all buckets"


def test_without_the_dense_weight_the_fastest_form_runs() -> None:
    known = record(cusparselt=(0.6, 0.7), unpack=(0.5, 0.5))
    assert choice.choose(known, 16, ("cusparselt", "unpack")).candidate.executor == "cusparselt"
    assert choice.choose(known, 16, ("unpack",)).candidate.executor == "unpack"


def test_measured_but_unusable_leaves_dense() -> None:
    assert choice.choose(Record({}, {}, {}), 4096, ALL).candidate == Candidate("dense")
    known = record(decode=(1.7, 1.7))
    assert choice.choose(known, 16, ALL).candidate == Candidate("dense"), "decode is not built here"


# -- measuring


def test_known_speedups_are_those_of_what_runs() -> None:
    known = table()
    known.put(Cell(64, 64, 16, "bfloat16", False), record(decode=(1.5, 1.4), cusparselt=(0.5, 0.5)))
    known.put(Cell(64, 64, 4096, "bfloat16", False), record(cusparselt=(1.6, 1.5)))
    shape = (known, 64, 64, torch.bfloat16, False, (1, 16, 4096))
    assert tables.known_speedups(*shape, {"dense", "decode", "cusparselt"}) == {16: 1.5, 4096: 1.6}
    assert tables.known_speedups(*shape, {"dense", "decode"}) == {16: 1.5, 4096: 1.0}
    assert tables.known_speedups(*shape, {"dense", "cusparselt"}) == {16: 1.0, 4096: 1.6}
    assert tables.known_speedups(*shape, {"decode"}) == {16: 1.5}
    below = (known, 64, 64, torch.bfloat16, False, (9, 4000, 300))
    assert tables.known_speedups(*below, {"dense", "decode", "cusparselt"}) == {9: 1.4, 4000: 1.5}


def test_the_best_verified_candidate_is_kept() -> None:
    worker = FakeWorker({Candidate("unpack"): 0.5, library(0): 1.2, library(1): 1.5})
    known = table()
    report = tune(worker, into=known)
    assert report.num_measured == 1 and not report.banned and not report.problems
    found = known.get(CELL)
    for timings in (found.top, found.interior):
        assert timings["cusparselt"] == Timing(library(1), 1e-5 / 1.5, 1.5)
        assert timings["unpack"].candidate == Candidate("unpack")


def test_the_top_may_win_where_the_counts_below_lose() -> None:
    known = table()
    tune(FakeWorker({Candidate("unpack"): 0.5, library(0): at_top(1.43, 0.997)}), into=known)
    assert choice.choose(known.get(CELL), 1024, ALL).candidate == library(0)
    assert choice.choose(known.get(CELL), 1016, ALL).candidate == Candidate("dense")


def test_the_top_and_the_counts_below_have_candidates_of_their_own() -> None:
    worker = FakeWorker(
        {library(0): at_top(1.5, 1.1), library(1): at_top(1.3, 1.2), library(2): at_top(0.9, 1.9)}
    )
    known = table()
    tune(worker, into=known)
    assert choice.choose(known.get(CELL), 1024, ALL).candidate == library(0)
    assert choice.choose(known.get(CELL), 1000, ALL).candidate == library(1)
    below = {candidate for candidate, tokens, _ in worker.tried if tokens < 1024}
    assert library(2) not in below, "too far behind at the top to be tried again"
    again = table()
    assert again.get(CELL) == known.get(CELL), "on disk, too"


def test_below_the_top_the_worst_count_decides() -> None:
    lowest, middle = CELL.interior
    worker = FakeWorker(
        {
            library(0): lambda tokens, _: {lowest: 1.5, middle: 1.0}.get(tokens, 1.5),
            library(1): lambda tokens, _: {lowest: 1.2, middle: 1.3}.get(tokens, 1.4),
        }
    )
    known = table()
    tune(worker, into=known)
    assert known.get(CELL).top["cusparselt"].candidate == library(0)
    assert known.get(CELL).interior["cusparselt"] == Timing(library(1), 1e-5 / 1.2, 1.2)


def test_one_token_is_a_range_of_its_own() -> None:
    known, cell = table(), CELL._replace(bucket=1)
    tune(FakeWorker({library(0): 1.2}), cell, into=known)
    assert known.get(cell).top and not known.get(cell).interior


def test_finalists_reorder_the_quick_ranking() -> None:
    quick = {0: 1.6, 1: 1.5, 2: 1.4, 3: 1.3}
    final = {0: 1.1, 1: 1.2, 2: 1.35, 3: 1.9}

    def speedup(algorithm: int) -> Callable[[int, bool], float]:
        return lambda _, is_final: (final if is_final else quick)[algorithm]

    worker = FakeWorker({library(algorithm): speedup(algorithm) for algorithm in quick})
    known = table()
    tune(worker, into=known)
    finalists = {candidate.algorithm for candidate, _, is_final in worker.tried if is_final}
    assert finalists == {0, 1, 2}, "the first three"
    for timings in (known.get(CELL).top, known.get(CELL).interior):
        assert timings["cusparselt"] == Timing(library(2), 1e-5 / 1.35, 1.35)


def test_splits_of_the_best_algorithms_are_tried() -> None:
    worker = FakeWorker({library(0): 1.1, library(1): 1.3, library(2): 1.2, library(2, 4, 1): 1.4})
    known = table()
    tune(worker, into=known)
    assert known.get(CELL).top["cusparselt"].candidate == library(2, 4, 1)
    split = {c.algorithm for c, *_ in worker.tried if c.split_k != 1}
    assert split == {1, 2}, "the two best"


def test_segment_k_is_not_tried_where_it_can_hang() -> None:
    small = search.split_variants(CELL._replace(n=384), [library(0)])
    assert all(candidate.split_k > 1 for candidate in small)
    assert search.split_variants(CELL._replace(bucket=4096), [library(0)]) == [library(0, -1)]


def test_a_wrong_candidate_is_banned_and_the_next_one_taken() -> None:
    wrong = Outcome("wrong", "relative error 0.3")
    worker = FakeWorker({library(0): 1.2, library(1): wrong})
    known = table()
    report = tune(worker, into=known)
    assert known.get(CELL).top["cusparselt"].candidate == library(0)
    assert known.get(CELL).banned == {"cusparselt 1/1/0": "relative error 0.3"}
    assert list(report.banned) == [f"{CELL}: cusparselt 1/1/0"]


@pytest.mark.parametrize("tokens", [CELL.bucket, *CELL.interior])
@pytest.mark.parametrize("kind", ["wrong", "crashed"])
def test_a_candidate_that_fails_at_one_count_is_not_kept_for_any(kind: str, tokens: int) -> None:
    bad = Outcome(kind, "at one count")
    worker = FakeWorker(
        {
            library(0): 1.2,
            library(1): lambda count, is_final: bad if is_final and count == tokens else 1.5,
        }
    )
    known = table()
    report = tune(worker, into=known)
    for timings in (known.get(CELL).top, known.get(CELL).interior):
        assert timings["cusparselt"].candidate == library(0)
    assert any("cusparselt 1/1/0" in name for name in report.banned)


def test_a_candidate_that_is_refused_below_the_top_is_kept_at_the_top() -> None:
    refused = Outcome("refused", "not for odd counts")
    worker = FakeWorker(
        {library(0): 1.2, library(1): lambda tokens, _: 1.5 if tokens == 1024 else refused}
    )
    known = table()
    tune(worker, into=known)
    assert known.get(CELL).top["cusparselt"].candidate == library(1)
    assert known.get(CELL).interior["cusparselt"].candidate == library(0)


@pytest.mark.parametrize("kind", ["crashed", "hung"])
def test_what_breaks_the_child_is_banned_for_the_dtype(kind: str) -> None:
    outcomes = {library(0): 1.2, library(1): Outcome(kind, "illegal instruction")}
    worker = FakeWorker(outcomes)
    known = table()
    other = CELL._replace(n=8192)
    report = tune(worker, CELL, other, CELL._replace(dtype="float16"), into=known)
    assert report.num_measured == 3
    tries = [candidate for candidate, *_ in worker.tried].count(library(1))
    assert tries == 2, "once for each dtype"
    assert "illegal instruction" in table().ban_reason("bfloat16", library(1)), "on disk"


@pytest.mark.parametrize("kind", ["memory", "failed"])
def test_what_is_not_the_candidates_fault_leaves_the_cell_to_the_rule(kind: str) -> None:
    worker = FakeWorker({library(0): Outcome(kind, "CUDA out of memory")})
    known = table()
    report = tune(worker, into=known)
    assert known.get(CELL) is None and not report.banned
    assert report.problems == {str(CELL): "cusparselt 0/1/0: CUDA out of memory"}


def test_the_deadline_keeps_what_was_finished() -> None:
    now = 0.0

    class Slow(FakeWorker):
        def measure(self, cell: Cell, candidate: Candidate, tokens: int, is_final: bool) -> Outcome:
            nonlocal now
            now += 10.0
            return super().measure(cell, candidate, tokens, is_final)

    cells = [CELL._replace(bucket=bucket) for bucket in (2048, 4096, 8192)]
    known = table()
    report = tuning.tune(
        known,
        cells,
        Slow({Candidate("unpack"): 0.5}),
        seconds=80.0,  # a cell takes five trials
        clock=lambda: now,
        show_progress=False,
    )
    assert (report.num_measured, report.num_known, report.num_late) == (1, 0, 2)
    assert known.get(cells[0]) is not None and known.get(cells[1]) is None


def test_known_cells_are_not_measured_again() -> None:
    worker = FakeWorker({library(0): 1.2})
    tune(worker)
    tried = len(worker.tried)
    assert tune(worker).num_known == 1
    assert len(worker.tried) == tried


# -- the file


def test_a_table_survives_the_process(cache: Path) -> None:
    tune(FakeWorker({library(3): 1.5, library(1): Outcome("wrong", "off")}))
    assert [path.name for path in cache.glob("*.json")] == ["nvidia-h200-cusparselt-0.8.1.json"]
    again = table()
    assert len(again) == 1
    assert again.get(CELL).top["cusparselt"].candidate == library(3)
    assert again.get(CELL).banned == {"cusparselt 1/1/0": "off"}
    assert len(Table("NVIDIA H100", "0.8.1")) == len(Table("NVIDIA H200", "0.10.0")) == 0


def test_the_users_table_goes_over_the_one_that_ships(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = CELL._replace(n=8192)
    shipped = table()
    for cell in (CELL, other):
        shipped.put(cell, record(cusparselt=(1.2, 1.2)))
    shipped.save()
    (tmp_path / "tables").mkdir()
    shipped.path.rename(tmp_path / "tables" / shipped.path.name)
    monkeypatch.setattr(tables, "__file__", str(tmp_path / "table.py"))
    tune(FakeWorker({library(3): 1.5}), CELL._replace(bucket=16))
    own = Table("NVIDIA H200", "0.8.1")
    own.put(CELL, record(cusparselt=(1.4, 1.4)))
    own.save()
    assert len(json.loads(own.path.read_text())["cells"]) == 2, "what shipped is not copied"
    again = table()
    assert len(again) == 3
    assert again.get(CELL).top["cusparselt"].speedup == 1.4
    assert again.get(other).top["cusparselt"].speedup == 1.2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 99, "cells": {}, "banned": {}}',
        '{"format": 1, "cells": {}, "banned": {}}',
        '{"format": 2, "cells": {"a": 1}}',
        '{"format": 2, "banned": {}, "cells": {"a": {"banned": {}, "top": {"abacus": {}}}}}',
    ],
)
def test_a_damaged_table_is_ignored_with_a_warning_and_written_anew(
    content: str, cache: Path
) -> None:
    path = table().path
    cache.mkdir()
    path.write_text(content)
    with pytest.warns(UserWarning, match="is ignored: it cannot be read"):
        known = table()
    assert len(known) == 0
    with pytest.warns(UserWarning, match="is ignored"):
        tune(FakeWorker({library(0): 1.5}), into=known)
    assert len(table()) == 1, "no warning any more"


def write_one(bucket: int) -> None:
    known = table()
    known.put(CELL._replace(bucket=bucket), record(unpack=(0.5, 0.5)))
    known.save()


def test_writers_keep_what_others_wrote(cache: Path) -> None:
    first, second = table(), table()
    first.put(CELL, record(cusparselt=(1.5, 1.4)))
    first.save()
    second.put(CELL._replace(n=64), record(cusparselt=(1.2, 1.2)))
    second.save()
    assert len(table()) == 2
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_one, args=(bucket,)) for bucket in BUCKETS[:4]]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(table()) == 6
    assert not list(cache.glob("*.tmp"))


def test_an_unwritable_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROXSPARSE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="Not a directory"):
        known = table()
    with pytest.raises(ProxsparseError, match=r"cannot be written.*PROXSPARSE_CACHE"):
        known.save()


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROXSPARSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/tmp/xdg")
    assert tables.cache_directory() == Path("/tmp/xdg/proxsparse")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tables.cache_directory() == Path.home() / ".cache/proxsparse"


# -- the child process

CHILD = """
import json, os, sys, time
print("noise", file=sys.stderr)
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "candidates":
        answer = {"candidates": [["unpack", -1, 1, 0], ["cusparselt", 0, 1, 0]]}
        answer["candidates"] += [["cusparselt", i, 1, 0] for i in (7, 8, 9)]
    else:
        algorithm = request["candidate"][1]
        if algorithm == 7:
            print("illegal instruction", file=sys.stderr, flush=True)
            os._exit(3)
        if algorithm == 8:
            time.sleep(60)
        answer = {"kind": "ok", "seconds": 1e-5, "speedup": 2.0 + algorithm}
        if algorithm == 9:
            answer = {"kind": "refused", "detail": "not supported"}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def make_child() -> Callable[..., ChildWorker]:
    def make(code: str = CHILD, **settings: float) -> ChildWorker:
        settings = {"start_seconds": 20.0, "measure_seconds": 1.0, **settings}
        return ChildWorker([sys.executable, "-c", code], **settings)

    return make


def test_a_child_that_crashes_or_hangs_costs_the_candidate_only(
    make_child: Callable[..., ChildWorker],
) -> None:
    known = table()
    with make_child() as worker:
        report = tune(worker, CELL._replace(bucket=4096, n=384), into=known)
    assert report.num_measured == 1
    banned = report.banned
    assert "crashed" in banned["bfloat16 cusparselt 7/1/0"]
    assert "exit code 3: illegal instruction" in banned["bfloat16 cusparselt 7/1/0"]
    assert "no answer within 1 s" in banned["bfloat16 cusparselt 8/1/0"]
    timings = known.get(CELL._replace(bucket=4096, n=384)).top
    assert timings["cusparselt"].candidate == library(0)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no CUDA device')", "crashed: exit code 1: no CUDA device"),
        ("import time; time.sleep(60)", "hung: no answer within 1 s"),
    ],
)
def test_a_child_that_cannot_start_leaves_everything_to_the_rule(
    make_child: Callable[..., ChildWorker], code: str, message: str
) -> None:
    with make_child(code, start_seconds=1.0) as worker:
        report = tune(worker)
    assert report.num_measured == 0
    assert message in report.problems[str(CELL)]


def test_what_the_child_cannot_set_up_is_a_problem(
    make_child: Callable[..., ChildWorker],
) -> None:
    code = "print('{}', flush=True); input(); print('{\"problem\": \"out of memory\"}', flush=True)"
    with make_child(code, start_seconds=20.0) as worker:
        assert tune(worker).problems == {str(CELL): "out of memory"}


# -- the clock


class Clock:
    """A GPU that slows down as it works: stands in for an event and for two graphs."""

    now = 0.0

    def __init__(self, seconds: float = 0.0, **_: bool) -> None:
        self.seconds = seconds

    def record(self) -> None:
        self.seconds = Clock.now

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Clock) -> float:
        return 1e3 * (other.seconds - self.seconds)

    def replay(self) -> None:
        Clock.now += self.seconds * (1 + Clock.now)


def test_a_clock_that_drifts_favours_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = pytest.importorskip("proxsparse.tuning.trials", reason="the extension was not built")
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    times = worker._time_in_turn(Clock(1e-2), Clock(2e-2), 2, 9)
    assert len(times) == 9 and times[-1][0] > 1.5 * times[0][0]
    ratios = [second / first for first, second in times]
    assert min(ratios) < 2 < max(ratios)
    assert statistics.fmean(ratios) == pytest.approx(2, rel=0.01)


SHIPPED = sorted((Path(choice.__file__).parent / "tables").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("error")
def test_tables_that_ship_are_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PROXSPARSE_CACHE", str(tmp_path))
    content = json.loads(path.read_text(encoding="utf-8"))
    table = Table(content["gpu"], content["cusparselt"])
    assert table.path.name == path.name
    assert len(table) == len(content["cells"]) > 0


# -- pruning

LLAMA = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
DECODE_TIMES = Path(__file__).parents[1] / "benchmarks/results/h200/sparse_linear_decode.json"


@pytest.fixture
def layouts() -> dict[str, Any]:
    executors = pytest.importorskip("proxsparse.backends.executors")
    tuned = executors.PREFILL_LAYOUTS[: executors.NUM_TUNED_PREFILL_LAYOUTS]
    return {"decode": executors.DECODE_LAYOUTS, "prefill": tuned}


def everything(cell: Cell, layouts: dict[str, Any]) -> list[Candidate]:
    """What a Hopper GPU can try, as `trials.Bench.candidates` lists it."""
    found = [Candidate("unpack")]
    if cell.bucket <= 256:
        found += [Candidate("decode", i) for i in range(-1, len(layouts["decode"]))]
    if cell.bucket > 64:
        found += [Candidate("prefill", i) for i in range(-1, len(layouts["prefill"]))]
    return found + [library(i) for i in range(-1, 21)]


def shipped() -> Table:
    return Table("NVIDIA H200", "0.8.0")


def test_pruning_keeps_what_wins_in_the_shipped_table(layouts: dict[str, Any]) -> None:
    known, kept, executors, total = shipped(), 0, 0, 0
    for name, found in known._records.items():
        shape, bucket, dtype, bias = name.split()
        cell = Cell(*map(int, shape.split("x")), int(bucket[1:]), dtype, bias == "bias")
        left = search.prune(cell, everything(cell, layouts), known.constants, layouts)
        for timings in filter(None, (found.top, found.interior)):
            best = max(timings.values(), key=lambda timing: timing.speedup).candidate
            total += 1
            kept += best._replace(split_k=1) in left
            executors += best.executor in {candidate.executor for candidate in left}
    assert total > 400 and kept > 0.8 * total  # others are within a percent of what is tried
    assert executors == total


def test_pruned_layouts_are_as_fast_as_all(layouts: dict[str, Any]) -> None:
    """By the time that every layout of the kernel for few tokens took on an H200."""
    times: dict[tuple[int, int, int], dict[Candidate, float]] = {}
    for row in json.loads(DECODE_TIMES.read_text(encoding="utf-8"))["rows"]:
        if not row["backend"].startswith("cuda"):
            continue
        shape, tokens = row["case"].removesuffix(" tokens").split(", ")
        n, k = map(int, shape.split("x"))
        words = row["backend"].removeprefix("cuda ")
        number = -1
        if words != "chosen":
            number = layouts["decode"].index(tuple(map(int, words.split("/"))))
        cells = times.setdefault((n, k, int(tokens)), {})
        cells[Candidate("decode", number)] = row["us_p50"]
    losses = []
    for (n, k, tokens), measured in times.items():
        cell = Cell(n, k, choice.find_bucket(tokens), "bfloat16", False)
        left = search.prune(cell, list(measured), shipped().constants, layouts)
        assert len(left) <= search.NUM_PREDICTED + 1
        losses.append(min(measured[c] for c in left) / min(measured.values()))
    assert len(losses) > 100
    assert statistics.geometric_mean(losses) < 1.005
    assert max(losses) < 1.13


def test_a_model_takes_a_part_of_the_trials(layouts: dict[str, Any]) -> None:
    """All token ranges of Llama-3.1-8B's layers, as `advise` tunes them."""

    class Gpu(FakeWorker):
        """Times that the model predicts; the library 1.1 times slower than the best."""

        def __init__(self) -> None:
            super().__init__({})

        def candidates(self, cell: Cell) -> list[Candidate]:
            return everything(cell, layouts)

        def measure(self, cell: Cell, candidate: Candidate, tokens: int, is_final: bool) -> Outcome:
            self.tried.append((candidate, tokens, is_final))
            gain = 1.4 - 0.02 * (candidate.algorithm % 7)
            if candidate.executor == "cusparselt":
                gain = 0.5 if cell.bucket <= 64 else 1.2
            return Outcome("ok", "", 1e-5, 0.4 if candidate.executor == "unpack" else gain)

    known = shipped()
    cells = [Cell(n, k, bucket, "float16", False) for n, k in LLAMA for bucket in BUCKETS]
    counts = []
    for constants in (None, known.constants):
        worker = Gpu()
        into = Table("NVIDIA H200", "0.8.0" if constants else "9.9.9")
        report = tuning.tune(
            *(into, cells, worker),
            seconds=60,
            show_progress=False,
            prune=None
            if constants is None
            else lambda cell, found: search.prune(cell, found, known.constants, layouts),
        )
        assert report.num_measured == len(cells)
        counts.append(len(worker.tried) / len(cells))
    everywhere, pruned = counts
    assert pruned < 31 and pruned < 0.35 * everywhere, counts


def test_without_constants_everything_is_tried(layouts: dict[str, Any]) -> None:
    cell = CELL._replace(bucket=128)
    found = everything(cell, layouts)
    assert search.prune(cell, found, None, layouts) == found
    only_library = [library(i) for i in range(4)]
    assert search.prune(cell, only_library, shipped().constants, layouts) == only_library


def test_an_executor_that_is_far_behind_has_one_final_trial() -> None:
    outcomes: dict[Candidate, float] = {Candidate("prefill", i): 1.5 for i in range(3)}
    worker = FakeWorker({**outcomes, **{library(i): 0.7 for i in range(3)}})
    known = table()
    tune(worker, into=known)
    finals = {c for c, _, is_final in worker.tried if is_final}
    assert sum(c.executor == "cusparselt" for c in finals) == 1
    assert all(c.split_k == 1 for c, *_ in worker.tried), "no split makes up for so much"
    assert set(known.get(CELL).top) == {"prefill", "cusparselt"}


def test_late_cells_are_named() -> None:
    report = tuning.tune(
        table(),
        [CELL],
        FakeWorker({library(0): 1.2}),
        seconds=0.0,
        show_progress=False,
    )
    assert report.late == [str(CELL)] and report.num_late == 1 and report.num_measured == 0
