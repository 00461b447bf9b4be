"""The best candidates of one cell.

All candidates have a quick trial; the leaders of each executor are measured with care, because
quick trials are noisy. What breaks the child process, or is wrong, is banned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from proxsparse.backends.choice import Candidate, Cell, Record, Timing

NUM_FINALISTS = 3  # of each executor are measured with care: quick trials are noisy
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


class Search:
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
