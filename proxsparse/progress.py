"""How far a long loop is: a bar where there is a terminal or a notebook, lines where there is none.

A bar that redraws itself fills a log file with garbage, and no bar at all leaves a container silent
for hours. So without a terminal a line says every half minute where the loop is; it comes from a
thread, because a single step of a large model can take longer than that.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TypeVar

EVERY_SECONDS = 30.0
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Progress:
    """A loop's progress, as a context; `update` says that more is done.

    Nothing is shown where the level of the logger `proxsparse.progress` is above INFO, which is
    how `--quiet` silences it.

    Args:
        description: what the loop does.
        total: how many units there are, if that is known.
        unit: what is counted.
        done: units done before.
        leave: whether a finished bar stays on the screen; without a terminal, whether the end is
            told.
        is_hidden: shows nothing, as for all but one of several processes.
        every: seconds between lines.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        *,
        unit: str = "it",
        done: int = 0,
        leave: bool = False,
        is_hidden: bool = False,
        every: float = EVERY_SECONDS,
    ) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._before, self._done, self._leave, self._every = done, done, leave, every
        self._figures: dict[str, str] = {}
        self._began = time.monotonic()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        is_hidden = is_hidden or _log.level > logging.INFO
        self._bar = _bar(description, total, unit, done, leave, is_hidden)
        silenced = is_hidden or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
        if self._bar.disable and not silenced:
            self._thread = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if self._thread is None:
            return
        self._end.set()
        self._thread.join()
        if self._leave and kind is None:
            print(self.line(), file=sys.stderr, flush=True)

    def update(self, count: int = 1, **figures: str) -> None:
        """Say that `count` more units are done, and what the latest figures are."""
        self._done += count
        if figures:
            self._figures = figures
            self._bar.set_postfix(figures)
        self._bar.update(count)

    def line(self) -> str:
        """Where the loop is, in one line: units, the figures last given, and the time left."""
        seconds = time.monotonic() - self._began
        of_all = "" if self._total is None else f"/{self._total:,}"
        parts = [f"{self._description}: {self._unit} {self._done:,}{of_all}"]
        parts += [f"{_label(name)} {value}" for name, value in self._figures.items()]
        here = self._done - self._before
        if self._total is not None and self._done >= self._total:
            parts.append(f"took {duration(seconds)}")
        elif self._total is not None and here > 0:
            parts.append(f"ETA {duration(seconds / here * (self._total - self._done))}")
        return ", ".join(parts)

    def _tell(self) -> None:
        while not self._end.wait(self._every):
            print(self.line(), file=sys.stderr, flush=True)


def progress(
    items: Iterable[_T], description: str, unit: str = "it", **options: Any
) -> Iterator[_T]:
    """Go through `items`, showing how far; options as for `Progress`."""
    options.setdefault("total", len(items) if isinstance(items, Sized) else None)
    with Progress(description, unit=unit, **options) as bar:
        for item in items:
            yield item
            bar.update()


def _label(name: str) -> str:
    return name.replace("_", " ").replace("2to4", "2:4")


def duration(seconds: float) -> str:
    """A time in words, e.g. 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _bar(
    description: str, total: int | None, unit: str, done: int, leave: bool, is_hidden: bool
) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without widgets gets the plain bar
        from tqdm.auto import tqdm

    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=done,
        leave=leave,
        disable=True if is_hidden else None,
    )
