"""Checkpoints of a learning run: atomic, rotating, safetensors only, so that none can run code.

One process writes a file, several write a directory with a part of each: the rows that it keeps.
Either is read by any number of processes, a file being a single part.

A checkpoint appears under its final name only once it is whole and on the disk, so a run killed at
any moment, or one that fills the disk, leaves the previous checkpoint behind.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proxsparse.errors import ProxsparseError
from proxsparse.learning import distributed
from proxsparse.models.files import check_room, sync
from proxsparse.models.forms import CheckpointHeader, checked

_log = logging.getLogger(__name__)
_KEEP = 2
_FINISHED = (".safetensors", ".sharded", ".dcp")  # .dcp: pickles of an older version, refused
_NAME = re.compile(r"step-[0-9]{8,}")


class _Damaged(ProxsparseError):
    """This checkpoint cannot be used; an older one may."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        directory: where they lie.
        recipe: identifies model, data and settings; a checkpoint of another recipe is refused.
    """

    directory: Path
    recipe: str

    def check_room(self, tensors: Mapping[str, Tensor], count: int) -> None:
        """Refuse a disk that cannot hold what the run will keep there.

        Args:
            tensors: the state; of several processes, this one's part.
            count: checkpoints that the run will write.

        Raises:
            ProxsparseError: names what is needed and what is free.
        """
        size = sum(x.numel() * x.element_size() for x in tensors.values())
        at_once = min(count, _KEEP + 1)  # the next one is written before the oldest is removed
        if at_once:
            self.directory.mkdir(parents=True, exist_ok=True)
            needed = size * at_once * distributed.world_size()
            check_room(self.directory, needed, f"room for {at_once} checkpoints")

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> Path:
        """Write the state after `step` steps, then remove all but the newest two.

        Args:
            step: steps done.
            tensors: the state; of several processes, this one's rows of what has two dimensions or
                more, and what all have of the rest.

        Raises:
            ProxsparseError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        from safetensors import SafetensorError

        rank, world = distributed.rank(), distributed.world_size()
        final = self.directory / f"step-{step:08d}{'.sharded' if world > 1 else '.safetensors'}"
        partial = final.with_suffix(".tmp")
        header = {"step": str(step), "recipe": self.recipe, "part": str(rank), "parts": str(world)}
        failure: Exception | None = None
        try:
            if distributed.is_main():
                self.directory.mkdir(parents=True, exist_ok=True)
                _remove(partial)
            distributed.barrier()
            if world > 1:
                partial.mkdir(exist_ok=True)
                _save_file(tensors, header, partial / f"part-{rank:05d}.safetensors")
            else:
                _save_file(tensors, header, partial)
        except (OSError, SafetensorError) as error:
            failure = error
        device = next((x.device for x in tensors.values()), torch.device("cpu"))
        if not distributed.any_process(failure is not None, device) and distributed.is_main():
            try:
                _name(partial, final)
                for old in self._files()[:-_KEEP]:
                    _remove(old)
            except OSError as error:
                failure = error
        if distributed.any_process(failure is not None, device):
            if distributed.is_main():
                _remove(partial)
            raise self._unwritten(final, failure) from failure
        return final

    def _unwritten(self, final: Path, failure: Exception | None) -> ProxsparseError:
        kept = [path for path in self._files() if path != final]
        left = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier one"
        reason = failure or "another process says why"
        return ProxsparseError(
            f"the checkpoint {final} could not be written ({reason}); {left}: make room, then "
            "continue with --resume"
        )

    def restore_(self, tensors: Mapping[str, Tensor], rows: Mapping[str, int], steps: int) -> int:
        """Fill `tensors` from the newest sound checkpoint; the steps it had done, or 0.

        Args:
            tensors: the state, as for `save`.
            rows: the rows over all processes of each tensor of two dimensions or more.
            steps: of the whole run; a checkpoint cannot have done more.

        Raises:
            ProxsparseError: it belongs to another model, text or settings, is of a kind that could
                run code, or there are checkpoints and none is sound.
        """
        device = next((x.device for x in tensors.values()), torch.device("cpu"))
        newest = ""
        for path in reversed(self._files()):
            reason, done = "another process cannot read it", 0
            try:
                done = self._read_(path, tensors, rows, steps)
            except _Damaged as error:
                reason = str(error)
            if not distributed.any_process(done == 0, device):
                return done
            newest = newest or reason
            _log.warning("checkpoint %s cannot be used (%s); trying an older one", path, reason)
        if newest:
            raise ProxsparseError(
                f"no checkpoint in {self.directory} can be used; the newest: {newest}. Start anew: "
                f"remove {self.directory.parent}, or choose another --output"
            )
        return 0

    def _read_(
        self, path: Path, tensors: Mapping[str, Tensor], rows: Mapping[str, int], steps: int
    ) -> int:
        """Fill `tensors` from one checkpoint; the steps it had done."""
        from safetensors import SafetensorError, safe_open

        if path.suffix == ".dcp":
            raise ProxsparseError(
                f"{path} holds pickles, as older versions wrote them, and reading one can run any "
                "code: finish that run with the version that began it, or start anew in another "
                "--output"
            )
        files = [path] if path.is_file() else sorted(path.glob("part-*.safetensors"))
        try:
            with ExitStack() as stack:
                parts = [
                    stack.enter_context(safe_open(str(file), framework="pt")) for file in files
                ]
                done = self._check(path, [part.metadata() for part in parts], steps)
                for name, x in tensors.items():
                    x.copy_(_own_part(parts, name, x, rows))
        except (SafetensorError, OSError) as error:
            raise _Damaged(f"it is truncated or no safetensors file: {error}") from error
        return done

    def _check(self, path: Path, metadata: list[Any], steps: int) -> int:
        """The steps that all parts of a checkpoint say it had done."""
        try:
            headers = [checked(CheckpointHeader, x or {}, "its header") for x in metadata]
        except ProxsparseError as error:
            raise _Damaged(str(error)) from error
        if any(header.recipe != self.recipe for header in headers):
            raise ProxsparseError(
                f"{path} was written by a run with another model, text or settings: resume "
                "with the same ones, or start anew without --resume"
            )
        numbers = [(int(header.part), int(header.parts)) for header in headers]
        if not numbers or numbers != [(i, len(numbers)) for i in range(len(numbers))]:
            raise _Damaged(f"it has the parts {numbers}, which are not all of one checkpoint")
        done = {int(header.step) for header in headers}
        if done != {int(path.stem.removeprefix("step-"))} or not 0 < max(done) <= steps:
            raise _Damaged(f"it says that it had done {sorted(done)} steps, of {steps} in this run")
        return done.pop()

    def last_path(self) -> Path | None:
        """The newest checkpoint, if any."""
        files = self._files()
        return files[-1] if files else None

    def _files(self) -> list[Path]:
        """The finished checkpoints, oldest first."""
        found = self.directory.glob("step-*")
        return sorted(
            (path for path in found if path.suffix in _FINISHED and _NAME.fullmatch(path.stem)),
            key=lambda path: int(path.stem.removeprefix("step-")),
        )


def _own_part(parts: list[Any], name: str, x: Tensor, rows: Mapping[str, int]) -> Tensor:
    """What a tensor like x holds in the parts of a checkpoint, this process's rows of it."""
    if x.dim() < 2:
        return _same_kind(parts[0].get_tensor(name), x, name)
    total = rows[name] if distributed.world_size() > 1 else x.shape[0]
    start, stop = distributed.own_range(total)
    pieces, offset = [], 0
    for part in parts:
        piece = part.get_slice(name)
        length = piece.get_shape()[0] if piece.get_shape() else 0
        first, last = max(start - offset, 0), min(stop - offset, length)
        if first < last:
            pieces.append(piece[first:last])
        offset += length
    if offset != total:
        raise _Damaged(f"its {name} has {offset} rows, not {total}")
    return _same_kind(torch.cat(pieces) if pieces else x[:0].cpu(), x, name)


def _same_kind(saved: Tensor, x: Tensor, name: str) -> Tensor:
    if saved.shape != x.shape or saved.dtype != x.dtype:
        raise _Damaged(
            f"its {name} is {list(saved.shape)} of {saved.dtype}, not {list(x.shape)} of {x.dtype}"
        )
    return saved


def _save_file(tensors: Mapping[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write a safetensors file and wait until it is on the disk."""
    from safetensors.torch import save_file

    save_file({name: x.contiguous() for name, x in tensors.items()}, str(path), metadata=metadata)
    sync(path)


def _name(partial: Path, final: Path) -> None:
    """Give a finished checkpoint its name; a directory cannot replace one that is not empty."""
    if partial.is_dir():
        sync(partial)
        _remove(final)
    os.replace(partial, final)
    sync(final.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
