"""The best candidates of one cell.

Where the GPU's model predicts times, `prune` leaves those candidates that may be the best. They
have a quick trial; the leaders are measured with care, because quick trials are noisy. What breaks
the child process, or is wrong, is banned.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from proxsparse.backends import prediction
from proxsparse.backends.choice import LIBRARY_CHOICE, Candidate, Cell, Record, Timing
from proxsparse.backends.prediction import Constants

NUM_FINALISTS = 3  # of each executor are measured with care: quick trials are noisy
# Of an executor that comes this close to the fastest of all; of one further behind only its first.
NEAR = 0.93
# So many layouts of a kernel are tried, the first that are predicted, beside its own choice. On an
# H200 that leaves the kernel for few tokens within 0.3 % of its best of 24 on average, and has 92 %
# of the winners of the kernel for many.
NUM_PREDICTED = 4
# The library is not tried where our kernels are predicted to beat it by far. Below this bucket none
# of its algorithms was ever the fastest.
LIBRARY_FROM = 192
NUM_ALGORITHMS = (
    4,
    2,
)  # of the library, the first that won before: up to 1536 tokens, and from there
# "decode" and "prefill" -> their layouts, by the number of a candidate.
Layouts = Mapping[str, Sequence[tuple[int, ...]]]
# Below the upper end those are tried that come this close to the best one's speed-up there: a
# smaller tile loses less than that at the end, and may win below.
LEADERS_WITHIN = 0.75


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


def prune(
    cell: Cell,
    candidates: Sequence[Candidate],
    constants: Constants | None,
    layouts: Layouts,
) -> list[Candidate]:
    """Those that may be the best; all where the GPU has no constants, or a kernel is missing.

    Args:
        cell: to be measured.
        candidates: what there is to try.
        constants: of the GPU's model.
        layouts: of our kernels.
    """
    ours = {c.executor for c in candidates if c.executor in ("decode", "prefill")}
    if constants is None or not ours:
        return list(candidates)
    kept = [c for c in candidates if c.executor in ours and c.algorithm == LIBRARY_CHOICE]
    for executor in ours:
        numbered = [c for c in candidates if c.executor == executor and c.algorithm >= 0]
        for tokens, most in ((cell.bucket, NUM_PREDICTED), (cell.lowest, 1)):
            if tokens != cell.bucket and cell.bucket <= 64:
                continue
            at = cell._replace(bucket=tokens)  # for the prediction alone
            numbered.sort(key=functools.partial(_predicted, at, constants, layouts))
            kept += [c for c in numbered[:most] if c not in kept]
    if "prefill" in ours and "decode" in ours:  # up to 256 tokens one of them is far behind
        times = {
            name: min(
                _predicted(cell, constants, layouts, c)
                for c in kept
                if c.executor == name and c.algorithm >= 0
            )
            for name in ours
        }
        behind = max(times, key=lambda name: times[name])
        if times[behind] > 2 * min(times.values()):
            kept = [c for c in kept if c.executor != behind]
    known = constants.algorithms
    library = [c for c in candidates if c.executor == "cusparselt"]
    if cell.bucket >= LIBRARY_FROM:
        most = NUM_ALGORITHMS[cell.bucket > 1536]
        kept += [c for c in library if c.algorithm in known[:most] or not known]
    return kept


def _predicted(cell: Cell, constants: Constants, layouts: Layouts, candidate: Candidate) -> float:
    """Seconds of a numbered layout at the bucket."""
    predict: Callable[..., float] = prediction.predict_prefill
    if candidate.executor == "decode":
        predict = prediction.predict_decode
    layout = layouts[candidate.executor][candidate.algorithm]
    return predict(layout[:3], cell.n, cell.k, cell.bucket, constants)


class Search:
    """Looks for the best candidates of one cell.

    All have a quick trial at the bucket, and the leaders another at the lowest token count; the
    first of either ranking are measured with care, and the best of those is kept.
    """

    def __init__(
        self,
        cell: Cell,
        measure: Callable[[Candidate, int, bool], Outcome],
        split: Callable[[Cell, Iterable[Candidate]], list[Candidate]] | None = None,
    ) -> None:
        self._cell, self._measure = cell, measure
        self._split = split or split_variants
        self._banned: dict[str, str] = {}
        # Wrong or fatal at one token count, and so not trusted at the others.
        self._unfit: set[Candidate] = set()

    def run(self, candidates: Iterable[Candidate]) -> Record:
        """What is found; raises Unmeasurable where the failure is no candidate's."""
        cell = self._cell
        quick = self._try_all(candidates, cell.bucket)
        best = self._rank(quick, "cusparselt")[:2]
        if best and quick[best[0]] < LEADERS_WITHIN * max(quick.values()):
            best = []  # splitting the sum does not make up for so much
        quick |= self._try_all(self._split(cell, best), cell.bucket)
        below: list[Timing] = []
        if cell.interior:
            leaders = []
            for executor in dict.fromkeys(candidate.executor for candidate in quick):
                ranked = self._rank(quick, executor)
                if not ranked:
                    continue
                first, *others = ranked
                is_near = quick[first] >= LEADERS_WITHIN * max(quick.values())
                within = LEADERS_WITHIN * quick[first]
                leaders += [first, *(c for c in others if is_near and quick[c] >= within)]
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
        near = NEAR * max(quick.values(), default=0.0)
        for executor in dict.fromkeys(candidate.executor for candidate in quick):
            ranked = self._rank(quick, executor)
            # The first of each is measured all the same: a layer may lack the form that wins here.
            most = NUM_FINALISTS if ranked and quick[ranked[0]] >= near else 1
            finalists += itertools.islice(self._time_with_care(ranked, counts), most)
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


def segment_variants(cell: Cell, best: Iterable[Candidate]) -> list[Candidate]:
    """Segment-K alone: of the splits, what was ever the fastest on a GPU that has constants."""
    return [candidate for candidate in split_variants(cell, best) if candidate.split_k < 0]


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
