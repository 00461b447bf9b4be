"""From a pruned checkpoint on disk to a packed one, and back to the same bits.

A packed directory is a Hugging Face checkpoint whose pruned layers are stored as `values` and
`codes`, and whose config.json says so: after `import proxsparse`, from_pretrained reads it as a
sparse model. Everything else in the directory is as `prune` wrote it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from proxsparse.errors import ProxsparseError
from proxsparse.inference.sparse_linear import sparse_layers
from proxsparse.inference.sparsify import densify_, sparsify_
from proxsparse.jobs.output import (
    check_output_fits,
    output_directory,
    stored_report,
    write_report,
)
from proxsparse.models.forms import read_report
from proxsparse.models.loading import LoadedModel, load_model, save_model, state_bytes

_COMPANIONS = ("masks.safetensors", "metrics.jsonl", "training.png")


def pack(
    model: str | os.PathLike[str], output: str | os.PathLike[str], *, memory: str = "min"
) -> dict[str, Any]:
    """Write a pruned checkpoint with its 2:4 layers packed.

    Args:
        model: a dense checkpoint whose layers are 2:4, such as `prune` writes; directory or name on
            the Hub.
        output: directory to create; must not exist, or be empty.
        memory: what the layers keep once loaded, "min" or "fast", see `sparse_linear`.

    Returns:
        {"layers": [{name, shape, dense_bytes, packed_bytes}], "left_dense": {name: reason},
        "dense_bytes", "packed_bytes": of these layers, "checkpoint_bytes": [before, after]}, which
        proxsparse.json holds too.

    Raises:
        ProxsparseError: packed already, no layer is 2:4, or the output cannot be written.
    """
    with output_directory(output) as partial:
        loaded = load_model(model, torch.device("cpu"))
        if sparse_layers(loaded.model):
            raise ProxsparseError(f"{model} is packed already")
        before = state_bytes(loaded.model)
        report = sparsify_(loaded.model, memory=memory)
        packed = {
            name: x.memory_bytes()["packed"] for name, x in sparse_layers(loaded.model).items()
        }
        result = {
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "dense_bytes": layer.dense_bytes,
                    "packed_bytes": packed[layer.name],
                }
                for layer in report.sparse
            ],
            "left_dense": report.left_dense,
            "dense_bytes": report.dense_bytes,
            "packed_bytes": sum(packed.values()),
            "checkpoint_bytes": [before, state_bytes(loaded.model)],
        }
        _write(loaded, partial, "packed", packed=result)
    return result


def unpack(model: str | os.PathLike[str], output: str | os.PathLike[str]) -> dict[str, Any]:
    """Write a packed checkpoint as the dense one it was made from, bit by bit.

    Args:
        model: a packed directory, or its name on the Hub.
        output: directory to create; must not exist, or be empty.

    Returns:
        {"layers": names of those that were packed, "checkpoint_bytes": [before, after]}.

    Raises:
        ProxsparseError: not packed, or the output cannot be written.
    """
    with output_directory(output) as partial:
        loaded = load_model(model, torch.device("cpu"))
        before = state_bytes(loaded.model)
        names = densify_(loaded.model)
        if not names:
            raise ProxsparseError(f"{model} is not packed: its layers are dense already")
        _write(loaded, partial, "dense")
    return {"layers": list(names), "checkpoint_bytes": [before, state_bytes(loaded.model)]}


def _write(loaded: LoadedModel, directory: Path, storage: str, **fields: Any) -> None:
    """Save the model, and beside it what lay beside the checkpoint it was read from."""
    source = Path(loaded.id)
    report = stored_report(read_report(source), storage, **fields)
    check_output_fits(directory, loaded.model)
    save_model(loaded.model, loaded.tokenizer, directory)
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    write_report(directory, report)
