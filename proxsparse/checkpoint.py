"""Checkpoints of a learning run: atomic, rotating, safetensors only.

A file appears under its final name only once it is whole and on the disk, so a run killed at any
moment, or one that fills the disk, leaves the previous checkpoint behind.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from proxsparse.errors import ProxsparseError

_log = logging.getLogger("proxsparse")
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

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> Path:
        """Write the state after `step` steps, then remove all but the newest two.

        Raises:
            ProxsparseError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self.directory.mkdir(parents=True, exist_ok=True)
        final = self.directory / f"step-{step:08d}.safetensors"
        partial = final.with_suffix(".tmp")
        try:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                str(partial),
                metadata={"step": str(step), "recipe": self.recipe},
            )
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, final)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            kept = self._files()
            left = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier one"
            raise ProxsparseError(
                f"the checkpoint {final} could not be written ({error}); {left}: make room, then "
                "continue with --resume"
            ) from error
        for old in self._files()[:-_KEEP]:
            old.unlink()
        return final

    def latest(self) -> tuple[int, dict[str, Tensor]] | None:
        """The newest readable checkpoint as (steps done, tensors on CPU); None when there is none.

        Raises:
            ProxsparseError: it belongs to another model, text or settings.
        """
        from safetensors import SafetensorError, safe_open

        for path in reversed(self._files()):
            try:
                with safe_open(str(path), framework="pt") as file:
                    metadata = file.metadata()
                    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                _log.warning("checkpoint %s cannot be read (%s); trying an older one", path, error)
                continue
            if metadata["recipe"] != self.recipe:
                raise ProxsparseError(
                    f"{path} was written by a run with another model, text or settings: resume "
                    "with the same ones, or start anew without --resume"
                )
            return int(metadata["step"]), tensors
        return None

    def last_path(self) -> Path | None:
        """The newest checkpoint's file, if any."""
        files = self._files()
        return files[-1] if files else None

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob("step-*.safetensors"))
