"""What runs where nothing was measured: predictions held against measurements. Needs no GPU."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from proxsparse.backends import choice, prediction
from proxsparse.backends import table as tables
from proxsparse.backends.choice import BUCKETS, Candidate, Cell
from proxsparse.backends.prediction import Constants
from proxsparse.backends.table import Table

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "proxsparse" / "backends" / "tables").glob("*.json"))
FITTED = [path for path in SHIPPED if "model" in json.loads(path.read_text(encoding="utf-8"))]
ALL = ("dense", "decode", "prefill", "cusparselt", "unpack")
H200 = "NVIDIA H200"


@pytest.fixture
def fit_rule(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("fit_rule")


@pytest.fixture
def constants() -> Constants:
    found = tables.shipped_constants(H200)
    assert found is not None
    return found


def cell(n: int, k: int, tokens: int) -> Cell:
    return Cell(n, k, choice.find_bucket(tokens), "bfloat16", False)


def choose(
    n: int, k: int, tokens: int, constants: Constants | None, available: tuple[str, ...] = ALL
) -> Candidate:
    return choice.choose(None, tokens, available, cell(n, k, tokens), constants).candidate


# -- against what was measured


@pytest.mark.parametrize("path", FITTED, ids=lambda path: path.stem)
def test_a_model_that_was_held_out_runs_well(path: Path, fit_rule: Any) -> None:
    """Constants and margins know nothing of the model: both are from the others alone."""
    measured = fit_rule.measured_for(path)
    pairs = []
    margins = json.loads(path.read_text(encoding="utf-8"))["model"]
    for one, fitted in fit_rule.hold_out(measured, margins["multiprocessors"]):
        margined = {name: margins[name] for name in ("margin", "margin_between")}
        pairs.append((one, fitted._replace(**margined)))
    with_dense = fit_rule.judge(pairs)
    assert with_dense.num > 300
    assert with_dense.regret <= 1.04
    assert with_dense.slower <= 0.01
    kept = margins["held_out"]
    assert with_dense.regret == pytest.approx(kept["regret"], abs=0.005)
    assert with_dense.num == kept["num"]
    without = fit_rule.judge(pairs, None, ("decode", "prefill", "cusparselt", "unpack"))
    assert without.regret <= 1.04


@pytest.mark.parametrize("path", FITTED, ids=lambda path: path.stem)
def test_the_constants_are_those_of_the_measurements(path: Path, fit_rule: Any) -> None:
    kept = Constants.parse(json.loads(path.read_text(encoding="utf-8"))["model"])
    fitted, errors = fit_rule.fit_all(fit_rule.measured_for(path), kept.multiprocessors)
    assert max(errors.values()) < 0.15
    assert fitted.smallest == kept.smallest
    assert fit_rule.best_algorithms(path) == kept.algorithms
    for n, k in ((4096, 4096), (14336, 4096), (1024, 8192)):
        for executor in prediction.EXECUTORS:
            ours, theirs = (
                prediction.predict(executor, n, k, 128, numbers) for numbers in (kept, fitted)
            )
            assert ours == pytest.approx(theirs, rel=0.01), "run python benchmarks/fit_rule.py"


def test_a_fit_finds_the_constants_behind_made_up_times(fit_rule: Any) -> None:
    numbers = {"dense": (4, 3.5, 3.6, 0.4, 0.1, 2.5), "decode": (3, 3.4, 110, 2500, 0.9)}
    for executor, true in numbers.items():
        known = fit_rule.with_constants(executor, true, 132)
        found = [
            (cell(n, k, m), (m,), prediction.predict(executor, n, k, m, known))
            for n, k in ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (512, 3584))
            for m in (1, 8, 16, 33, 64, 128, 256)
        ]
        fitted, error = fit_rule.fit(executor, found, 132)
        assert error < 0.02, (executor, fitted)


# -- what is chosen


def test_large_layers_run_sparse_where_it_pays(constants: Constants) -> None:
    for n, k in ((14336, 5120), (5120, 14336), (9216, 3584)):
        assert choose(n, k, 1, constants) == Candidate("decode")
        assert choose(n, k, 64, constants) == Candidate("decode")
        assert choose(n, k, 4096, constants) == Candidate("prefill")
        assert choose(n, k, 4096, constants, ("dense", "unpack")) == Candidate("dense")


@pytest.mark.parametrize(("n", "k"), [(576, 576), (3072, 1024), (64, 64), (128, 65536)])
def test_layers_smaller_than_all_that_were_measured_run_dense(
    n: int, k: int, constants: Constants
) -> None:
    assert not constants._replace(smallest=(512, 1792, 1 << 20)).covers(n, k)
    narrow = constants._replace(smallest=(512, 1792, 1 << 20))
    for tokens in (1, 5, 48, *BUCKETS):
        assert choose(n, k, tokens, narrow) == Candidate("dense")
        assert choose(n, k, tokens, None) == Candidate("dense")
        without = choose(n, k, tokens, narrow, ("decode", "prefill", "unpack"))
        assert without.executor in ("decode", "prefill")


def test_a_prediction_needs_its_margin(constants: Constants) -> None:
    shape = 14336, 4096, 4096
    gain = choice.predict_speedups(cell(*shape), 4096, ALL, constants)["prefill"]
    assert choose(*shape, constants._replace(margin=gain - 0.01)) == Candidate("prefill")
    assert choose(*shape, constants._replace(margin=gain + 0.01)) == Candidate("dense")
    between = 14336, 4096, 1000  # fills no whole tiles: the worst count of the range decides
    assert choose(*between, constants._replace(margin_between=9)) == Candidate("dense")
    assert choose(*between, constants._replace(margin=9, margin_between=1)) == Candidate("prefill")


def test_counts_of_one_range_run_on_the_same(constants: Constants) -> None:
    """What is decided for the lowest count of a range is what any other would decide."""
    starts = {choice.range_of(tokens): tokens for tokens in choice.RANGE_STARTS}
    assert list(starts.values()) == choice.RANGE_STARTS, "no range twice"
    for tokens in (*range(1, 2300, 7), 5000, 16383, 16384, 40000):
        start = starts[choice.range_of(tokens)]
        assert start <= tokens
        for shape in ((14336, 4096), (4096, 4096), (1024, 5120)):
            assert choose(*shape, tokens, constants) == choose(*shape, start, constants)
    assert choose(14336, 4096, 800, constants) != choose(14336, 4096, 1000, constants)


def test_the_reason_is_in_words(constants: Constants) -> None:
    def reason(n: int, k: int, tokens: int, known: Constants | None) -> str:
        return choice.choose(None, tokens, ALL, cell(n, k, tokens), known).reason

    assert re.fullmatch(
        r"predicted: decode 1\.\d\d times as fast as dense", reason(14336, 4096, 8, constants)
    )
    assert "is asked of a prediction" in reason(
        14336, 4096, 8, constants._replace(margin=3.0, margin_between=3.0)
    )
    assert "nothing as small" in reason(64, 64, 8, constants)
    assert reason(14336, 4096, 8, None).startswith("by rule")


def test_more_takes_longer(constants: Constants) -> None:
    for executor in prediction.EXECUTORS:
        times = [prediction.predict(executor, 4096, 4096, m, constants) for m in (1, 128, 256)]
        assert times == sorted(times)
        small, large = (prediction.predict(executor, n, 8192, 64, constants) for n in (512, 28672))
        assert 1e-6 < small < large < 1e-3


def test_a_layer_says_once_what_it_runs_on_and_why(
    constants: Constants, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend: Any = pytest.importorskip("proxsparse.backends.cuda")
    for name in ("can_decode", "can_prefill"):
        monkeypatch.setattr(backend, name, lambda *_: "")
    monkeypatch.setattr(backend, "is_right", lambda *_: True)
    monkeypatch.setattr(backend, "executor", lambda candidate, *_: candidate)
    monkeypatch.setattr(backend.cusparselt, "find_library", lambda: "there is none")
    monkeypatch.setattr(backend, "_constants", lambda _: constants)
    monkeypatch.setattr(backend._cuda, "has_kernels", True)
    monkeypatch.setattr(tables, "decisions", {})
    dense = torch.empty(14336, 4096, dtype=torch.bfloat16)
    values, x = dense[:, :2048], torch.empty(16, 4096, dtype=torch.bfloat16)
    caplog.set_level("INFO", logger="proxsparse.backends.cuda")
    for tokens in (16, 12, 11, 16):  # the bucket, and below it
        run = backend.find_run(x[:tokens], values, values, None, None, dense)
        assert run == Candidate("decode")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    wanted = (
        r"14336x4096 m16 bfloat16 no-bias runs on decode \(predicted: decode 1\.\d\d times .*\)"
    )
    assert all(re.fullmatch(wanted, line) for line in lines), lines


# -- the file


def test_constants_serve_every_version_of_the_library() -> None:
    assert tables.shipped_constants(H200, "0.8.0") == tables.shipped_constants(H200, "9.9.9")
    assert tables.shipped_constants("NVIDIA A100-SXM4-80GB") is None
    assert Table(H200, "9.9.9").constants == tables.shipped_constants(H200)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dense", [1.0]),
        ("decode", [1, 2, 3, 4, "x"]),
        ("prefill", [1, 2, 3, 4, -1]),
        ("margin", ""),
    ],
)
def test_damaged_constants_are_refused(field: str, value: Any) -> None:
    entry = json.loads(FITTED[0].read_text(encoding="utf-8"))["model"]
    Constants.parse(entry)
    with pytest.raises(ValueError, match=r"needs|could not convert"):
        Constants.parse({**entry, field: value})
    del entry[field]
    with pytest.raises(KeyError):
        Constants.parse(entry)


def test_predicted_speedups_are_those_of_what_would_run() -> None:
    known = Table(H200, "0.8.0")
    shape = (known, 14336, 4096, torch.bfloat16, False, (1, 4096))
    found = tables.predicted_speedups(*shape, ALL)
    assert found[1] > 1.4 and found[4096] > 1.3
    assert tables.predicted_speedups(*shape, ("dense",)) == {1: 1.0, 4096: 1.0}
    known.constants = None
    assert tables.predicted_speedups(*shape, ALL) == {}


def test_the_plan_is_that_of_the_kernel() -> None:
    source = (ROOT / "csrc" / "cuda" / "prefill_plan.h").read_text(encoding="utf-8")
    listed = re.search(r"kCandidates\[\] = \{(.*?)\};", source, re.DOTALL)
    assert listed
    found = re.findall(r"\{\{(\d+), (\d+), (\d+)\}, (\d+)\}", listed[1])
    layouts = {(int(r), int(t), int(c)): int(clocks) for r, t, c, clocks in found}
    assert layouts == prediction.PREFILL_CLOCKS
    numbers = re.search(r"kTileClocks = (\d+), kPartClocks = (\d+), kAddClocks = (\d+)", source)
    assert numbers
    assert tuple(map(float, numbers.groups())) == (
        prediction._TILE_CLOCKS,
        prediction._PART_CLOCKS,
        prediction._ADD_CLOCKS,
    )
