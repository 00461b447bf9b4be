"""The directory that a job writes: whole or not there, with a report of how it was made.

A result grows in `OUTPUT.partial`, which a marker says to be ours, under a lock that only one run
can hold. It gets its name in one step, when every byte of it is on the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from proxsparse.errors import ProxsparseError
from proxsparse.jobs.card import write_card
from proxsparse.jobs.checks import (
    MARKER,
    check_output,
    final_path,
    partial_path,
    read_marker,
    worth_keeping,
)
from proxsparse.jobs.recipe import Recipe
from proxsparse.learning import distributed
from proxsparse.models.checkpoint_files import open_checkpoint, write_checkpoint
from proxsparse.models.files import check_room, is_full_disk, sync, sync_tree, write_text_whole
from proxsparse.models.loading import LoadedModel, save_model
from proxsparse.models.masks import FILE, Masks, layer_report, targets_of
from proxsparse.models.rewriting import FileTargets
from proxsparse.models.targets import Targets

FORMAT = "proxsparse-1"
_RESUMABLE = ("checkpoints", "metrics.jsonl", MARKER)


@contextlib.contextmanager
def output_directory(output: str | os.PathLike[str], *, resume: bool = False) -> Iterator[Path]:
    """A directory to fill, which gets the name `output` only if the block succeeds.

    Raises:
        ProxsparseError: `output` is taken or cannot be replaced, another run writes it now, an
            unfinished run or something foreign lies beside it, or the disk is full.
    """
    final = final_path(output)
    partial = partial_path(final)
    distributed.check_joined(f"writing {output}")
    if not distributed.is_main():
        distributed.barrier()
        yield partial
        return
    check_output(output, resume=resume)
    with _only_writer(final):
        if (final / MARKER).is_file():
            _tidy(final)
        check_output(output, resume=resume)  # the last writer may have finished just now
        found = _prepare(partial, resume)
        distributed.barrier()
        try:
            yield partial
            sync_tree(partial)
        except BaseException as error:
            keep = worth_keeping(partial) or found
            if not keep:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, Exception) and is_full_disk(error):
                raise _full_disk(error, final, worth_keeping(partial)) from error
            raise
        _publish(partial, final)


@contextlib.contextmanager
def _only_writer(final: Path) -> Iterator[None]:
    """Within the context no other run writes `final`.

    Raises:
        ProxsparseError: one does already, or the directory above cannot be written.
    """
    from filelock import FileLock, Timeout

    path = partial_path(final).with_suffix(".partial.lock")
    lock = FileLock(path, blocking=False)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        marker = read_marker(partial_path(final))
        who = f" (process {marker.pid} on {marker.host})" if marker.pid else ""
        raise ProxsparseError(
            f"another run{who} is writing {final} now: wait for it, or choose another --output"
        ) from error
    except OSError as error:
        raise ProxsparseError(f"the output directory {final} cannot be made: {error}") from error
    try:
        yield
    finally:
        # Removed while it is held; one who opened it before finds that it has no name any more.
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()
        lock.release()


def _prepare(partial: Path, resume: bool) -> bool:
    """Make the partial directory, or take it over; whether there was one to resume from."""
    found = resume and partial.is_dir()
    try:
        if found:  # what an earlier attempt has written of the result is written anew
            for path in partial.iterdir():
                if path.name not in _RESUMABLE:
                    _remove(path)
        elif partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=True)
        _mark(partial, finished=False, host=socket.gethostname(), pid=os.getpid())
    except OSError as error:
        if not found:
            shutil.rmtree(partial, ignore_errors=True)
        raise ProxsparseError(f"the output directory {partial} cannot be made: {error}") from error
    return found


def claim(partial: Path, identity: str) -> None:
    """Say which job the files in `partial` belong to.

    Args:
        partial: from `output_directory`.
        identity: hash of model, text and settings.

    Raises:
        ProxsparseError: they belong to another one.
    """
    if read_marker(partial).identity not in ("", identity):
        raise ProxsparseError(
            f"{partial} was written by a run with another model, text or settings: resume with the "
            "same ones, or start anew without --resume and with another --output"
        )
    distributed.barrier()
    if distributed.is_main():
        _mark(partial, identity=identity)


def _mark(partial: Path, **changes: Any) -> None:
    marker = dataclasses.replace(read_marker(partial), **changes)
    write_text_whole(partial / MARKER, json.dumps(dataclasses.asdict(marker), indent=2) + "\n")


def _publish(partial: Path, final: Path) -> None:
    """Give a finished directory its name, then remove what only the run needed.

    Raises:
        ProxsparseError: something has taken the name meanwhile; the result stays where it is.
    """
    try:
        os.replace(partial, final)
    except OSError as error:
        with contextlib.suppress(OSError):
            _mark(partial, finished=True)
        raise ProxsparseError(
            f"{final} was made by something else meanwhile ({error.strerror}): the finished result "
            f"is {partial}; move {final} away and rename that"
        ) from error
    sync(final.parent)
    _tidy(final)


def _tidy(final: Path) -> None:
    """Remove checkpoints and marker of a finished run; the marker last, so that it can go on."""
    shutil.rmtree(final / "checkpoints", ignore_errors=True)
    with contextlib.suppress(OSError):
        (final / MARKER).unlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _full_disk(error: Exception, final: Path, resumable: bool) -> ProxsparseError:
    if isinstance(error, ProxsparseError) and "make room" in str(error):
        return error
    reason = " ".join(str(error).split())[:300]
    how = "continue with --resume" if resumable else "run it again"
    return ProxsparseError(
        f"{final} could not be written ({reason}): make room, then {how}, or choose another "
        "--output"
    )


def check_output_fits(partial: Path, model: nn.Module, targets: Targets | None = None) -> None:
    """Refuse a disk that cannot hold the result.

    Args:
        partial: where it will be written.
        model: in the dtypes that are saved; may be on the meta device.
        targets: whose masks are saved as well.

    Raises:
        ProxsparseError: names what is needed and what is free.
    """
    tensors = {id(p): p for p in model.parameters()}.values()
    needed = sum(p.numel() * p.element_size() for p in tensors)
    needed += sum(t.parameter.numel() for t in targets.layers) // 8 if targets else 0
    if distributed.is_main():
        check_room(partial, needed, "the result")


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


def pruned_report(
    recipe: Mapping[str, Any],
    base: LoadedModel,
    fingerprint: str,
    targets: Targets,
    masks: Masks,
    **fields: Any,
) -> dict[str, Any]:
    """What `proxsparse.json` says of a model that is about to be pruned.

    Args:
        recipe: the settings that the masks were made with.
        base: the model, its weights still whole.
        fingerprint: of its weights, see `model_fingerprint`.
        targets: what is pruned.
        masks: how.
        **fields: what this job alone has to say.
    """
    origin = {"id": base.id, "revision": base.revision, "fingerprint": fingerprint}
    if base.dequantised_from is not None:
        origin["dequantised_from"] = base.dequantised_from
    return {
        "format": FORMAT,
        "storage": "dense",
        "recipe": dict(recipe),
        "base": origin,
        "versions": versions(),
        **fields,
        "layers": layer_report(targets, masks),
        "left_dense": dict(targets.left_dense),
    }


def stored_report(before: Mapping[str, Any] | None, storage: str, **fields: Any) -> dict[str, Any]:
    """What `proxsparse.json` says of a model that is stored in another way than before.

    Args:
        before: the report beside the model it was made from, if there is one.
        storage: "dense" or "packed".
        **fields: what is to be said of it.
    """
    before = before or {"format": FORMAT, "storage": storage, "versions": versions()}
    kept = {key: value for key, value in before.items() if key != "packed"}
    return {**kept, "storage": storage, **fields}


def write_report(directory: Path, report: Mapping[str, Any]) -> None:
    """Write `proxsparse.json`."""
    write_text_whole(directory / "proxsparse.json", json.dumps(report, indent=2) + "\n")


def write_result(
    directory: Path,
    base: LoadedModel,
    masks: Masks,
    report: dict[str, Any],
    history: list[dict[str, float]],
    dense_loss: float | None = None,
    fp8_entry: dict[str, Any] | None = None,
) -> None:
    """Write a pruned model, its masks, report, card and training plot into `directory`.

    The rest of the checkpoint that the model was read from comes along bitwise. One that was made
    (`random_init`, GGUF) is written as transformers has it. With an entry that says FP8_DYNAMIC,
    pruned layers are written in FP8: those of the files as they are there, others rounded row by
    row.
    """
    if base.is_made:
        save_model(base.model, base.tokenizer, directory)
        write_card(directory, report, directory)
    else:
        files = open_checkpoint(base.id, base.revision)
        write_card(directory, report, files.directory)
        places = FileTargets(base.model, targets_of(base.model, masks), files)
        change = places.masking(masks, in_fp8=fp8_entry is not None)
        write_checkpoint(files, directory, change, quantization_config=fp8_entry)
    masks.save(directory / FILE)
    if history:
        from proxsparse.jobs.plots import plot_training

        title = f"{Path(base.id).name}, {report['recipe'].get('method', '')}"
        plot_training(history, directory / "training.png", title, dense_loss)
    write_report(directory, report)
