"""The directory that a job writes: whole or not there, with a report of how it was made."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from proxsparse.errors import ProxsparseError
from proxsparse.jobs.recipe import Recipe
from proxsparse.learning import distributed
from proxsparse.learning.checkpoint import checkpoints_in
from proxsparse.models.checkpoint_files import open_checkpoint, write_checkpoint
from proxsparse.models.loading import (
    LoadedModel,
    save_model,
)
from proxsparse.models.masks import FILE, Masks, targets_of
from proxsparse.models.rewriting import FileTargets

FORMAT = "proxsparse-1"


@contextlib.contextmanager
def output_directory(output: str | os.PathLike[str], *, resume: bool = False) -> Iterator[Path]:
    """A directory to fill, which gets the name `output` only if the block succeeds.

    Raises:
        ProxsparseError: `output` is there and not empty, or an unfinished run lies beside it.
    """
    final = Path(output).expanduser().absolute()
    partial = final.with_name(final.name + ".partial")
    if not distributed.is_main():
        distributed.barrier()
        yield partial
        return
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ProxsparseError(
            f"{output} exists and is not empty: choose another --output or remove it first"
        )
    if not resume and checkpoints_in(partial / "checkpoints"):
        raise ProxsparseError(
            f"an unfinished run lies in {partial}: continue it with --resume, or remove it"
        )
    try:
        if partial.exists() and not resume:
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProxsparseError(f"the output directory {output} cannot be made: {error}") from error
    distributed.barrier()
    try:
        yield partial
    except BaseException:
        if not checkpoints_in(partial / "checkpoints"):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(partial / "checkpoints", ignore_errors=True)
    if final.is_dir():
        final.rmdir()
    os.replace(partial, final)


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    import transformers

    from proxsparse import __version__

    return {
        "proxsparse": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def mask_metadata(
    recipe: Recipe, fingerprint: str, base_id: str, revision: str | None
) -> dict[str, str]:
    """What a mask file says about the model it belongs to and how it was made."""
    return {
        "base_id": base_id,
        "base_revision": revision or "",
        "base_fingerprint": fingerprint,
        "method": recipe.method.name,
        "weights_updated": json.dumps(recipe.method.updates_weights(recipe.options)),
        "recipe": json.dumps(recipe.as_dict()),
    }


def write_result(
    directory: Path,
    base: LoadedModel,
    masks: Masks,
    report: dict[str, Any],
    history: list[dict[str, float]],
) -> None:
    """Write a pruned model, its masks, its report and its training plot into `directory`.

    The rest of the checkpoint that the model was read from comes along bitwise. One that was made
    (`random_init`) is written as transformers has it.
    """
    if base.is_made:
        save_model(base.model, base.tokenizer, directory)
    else:
        files = open_checkpoint(base.id, base.revision)
        places = FileTargets(base.model, targets_of(base.model, masks), files)
        write_checkpoint(files, directory, places.masking(masks))
    try:
        masks.save(directory / FILE)
        text = json.dumps(report, indent=2) + "\n"
        (directory / "proxsparse.json").write_text(text, encoding="utf-8")
        if history:
            from proxsparse.jobs.plots import plot_training

            plot_training(history, directory / "training.png")
    except OSError as error:
        raise ProxsparseError(
            f"the results could not be written to {directory}: {error}"
        ) from error
