"""What was measured, on disk: one JSON file per GPU and cuSPARSELt version.

Tables for some GPUs ship with the package and are read first; what is measured here goes to the
user's cache directory, and wins.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from proxsparse.backends.choice import (
    EXECUTORS,
    Candidate,
    Cell,
    Record,
    Timing,
    choose,
    find_bucket,
    predict_speedups,
)
from proxsparse.backends.prediction import Constants
from proxsparse.errors import ProxsparseError

_FORMAT = 2  # of the table files


def cache_directory() -> Path:
    """Where tables are kept: $PROXSPARSE_CACHE, or proxsparse in the user's cache directory."""
    own = os.environ.get("PROXSPARSE_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "proxsparse"


def _slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def shipped_constants(gpu: str, library: str = "") -> Constants | None:
    """The constants of the GPU's model, from the tables that ship; None where there are none.

    They do not depend on the library, but for which of its algorithms are worth a try: those of
    its own table come first.
    """
    tables = Path(__file__).with_name("tables")
    paths = sorted(tables.glob(f"{_slug(gpu)}-cusparselt-*.json"))
    paths.sort(key=lambda path: not path.stem.endswith(f"-{library}"))
    for path in paths:
        entry = json.loads(path.read_text(encoding="utf-8")).get("model")
        if entry is not None:
            return Constants.parse(entry)
    return None


class Table:
    """Records by cell, and bans by dtype, for one GPU model and one cuSPARSELt version.

    A candidate that crashed or hung is banned for its dtype everywhere; one that was wrong, in its
    cell.

    Attributes:
        gpu: the GPU's name.
        library: version of cuSPARSELt.
        path: the user's file.
        constants: of the GPU's model of executors' times, or None where no table ships any.
    """

    def __init__(self, gpu: str, library: str) -> None:
        self.gpu, self.library = gpu, library
        self.constants = shipped_constants(gpu, library)
        name = f"{_slug(gpu)}-cusparselt-{library}.json"
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


def read_records(path: Path) -> dict[str, Record]:
    """The records of a table file by cell; none, with a warning, of one that is damaged."""
    return _read_table(path)[0]


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
        chosen = choose(record, count, available).candidate
        timing = record.timings(count).get(chosen.executor)
        if chosen.executor == "dense":
            known[count] = 1.0
        elif timing is not None:
            known[count] = timing.speedup
    return known


def predicted_speedups(
    table: Table,
    n: int,
    k: int,
    dtype: torch.dtype,
    has_bias: bool,
    tokens: Iterable[int],
    available: Collection[str],
) -> dict[int, float]:
    """Token count -> speed-up over dense that would be predicted, had nothing been measured.

    1 where it would run dense; empty on a GPU without constants. Arguments as above.
    """
    if table.constants is None:
        return {}
    name = str(dtype).removeprefix("torch.")
    predicted = {}
    for count in tokens:
        cell = Cell(n, k, find_bucket(count), name, has_bias)
        chosen = choose(None, count, available, cell, table.constants).candidate.executor
        speedups = predict_speedups(cell, count, available, table.constants)
        predicted[count] = speedups.get(chosen, 1.0)
    return predicted


# What the backend has decided, by its own keys; emptied when a table changes, and the revision
# counts how often that was.
decisions: dict[Any, Any] = {}
revision = 0


def forget_decisions() -> None:
    """Let everything be decided anew, by what the tables hold now."""
    global revision
    decisions.clear()
    revision += 1
