"""Checkpoints of a learning run: atomic, rotating, no pickles of our own.

One process writes a safetensors file, several write a directory by torch.distributed.checkpoint;
either is read by any number of processes.

A file appears under its final name only once it is whole and on the disk, so a run killed at any
moment, or one that fills the disk, leaves the previous checkpoint behind.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from proxsparse.errors import ProxsparseError
from proxsparse.learning import distributed

_log = logging.getLogger(__name__)
_KEEP = 2


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        directory: where they lie.
        recipe: identifies model, data and settings; a checkpoint of another recipe is refused.
    """

    directory: Path
    recipe: str

    def save(
        self, step: int, tensors: Mapping[str, Tensor], rows: Mapping[str, int] | None = None
    ) -> Path:
        """Write the state after `step` steps, then remove all but the newest two.

        Args:
            step: steps done.
            tensors: the state; of several processes, this one's part.
            rows: of several processes, see `distributed.save_sharded`.

        Raises:
            ProxsparseError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        from safetensors import SafetensorError
        from torch.distributed.checkpoint.api import CheckpointException

        self.directory.mkdir(parents=True, exist_ok=True)
        metadata = {"step": str(step), "recipe": self.recipe}
        several = distributed.world_size() > 1
        final = self.directory / f"step-{step:08d}{'.dcp' if several else '.safetensors'}"
        partial = final.with_suffix(".tmp")
        try:
            if several:
                distributed.save_sharded(tensors, rows or {}, partial)
                if distributed.is_main():
                    (partial / "proxsparse.json").write_text(json.dumps(metadata), "utf-8")
                    os.replace(partial, final)
            else:
                _save_file(tensors, metadata, partial)
                os.replace(partial, final)
        except (OSError, SafetensorError, CheckpointException) as error:
            _remove(partial)
            kept = self._files()
            left = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier one"
            raise ProxsparseError(
                f"the checkpoint {final} could not be written ({error}); {left}: make room, then "
                "continue with --resume"
            ) from error
        if distributed.is_main():
            for old in self._files()[:-_KEEP]:
                _remove(old)
        distributed.barrier()
        return final

    def restore_(self, tensors: Mapping[str, Tensor], rows: Mapping[str, int]) -> int:
        """Fill `tensors` from the newest readable checkpoint; the steps it had done, or 0.

        Args:
            tensors: the state; of several processes, this one's part.
            rows: see `distributed.save_sharded`.

        Raises:
            ProxsparseError: it belongs to another model, text or settings.
        """
        newest = self.last_path()
        if newest is not None and newest.is_dir():
            metadata = json.loads((newest / "proxsparse.json").read_text("utf-8"))
            self._check(metadata, newest)
            distributed.load_sharded_(tensors, rows, newest)
            return int(metadata["step"])
        found = self.latest()
        if found is None:
            return 0
        done, whole = found
        for name, x in tensors.items():
            x.copy_(distributed.own_rows(whole[name]) if x.dim() >= 2 else whole[name])
        return done

    def latest(self) -> tuple[int, dict[str, Tensor]] | None:
        """The newest readable checkpoint as (steps done, tensors on CPU); None when there is none.

        Raises:
            ProxsparseError: it belongs to another model, text or settings.
        """
        from safetensors import SafetensorError, safe_open

        for path in reversed([path for path in self._files() if path.is_file()]):
            try:
                with safe_open(str(path), framework="pt") as file:
                    metadata = file.metadata()
                    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                _log.warning("checkpoint %s cannot be read (%s); trying an older one", path, error)
                continue
            self._check(metadata, path)
            return int(metadata["step"]), tensors
        return None

    def last_path(self) -> Path | None:
        """The newest checkpoint's file, if any."""
        files = self._files()
        return files[-1] if files else None

    def _files(self) -> list[Path]:
        return checkpoints_in(self.directory)

    def _check(self, metadata: Mapping[str, str], path: Path) -> None:
        if metadata["recipe"] != self.recipe:
            raise ProxsparseError(
                f"{path} was written by a run with another model, text or settings: resume "
                "with the same ones, or start anew without --resume"
            )


def checkpoints_in(directory: Path) -> list[Path]:
    """The finished checkpoints of a directory, oldest first."""
    finished = (".safetensors", ".dcp")
    return sorted(path for path in directory.glob("step-*") if path.suffix in finished)


def _save_file(tensors: Mapping[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write a safetensors file and wait until it is on the disk."""
    from safetensors.torch import save_file

    save_file({name: x.contiguous() for name, x in tensors.items()}, str(path), metadata=metadata)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
