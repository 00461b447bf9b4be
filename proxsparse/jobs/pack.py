"""From a pruned checkpoint on disk to a packed one, and back to the same bits.

A packed directory is a Hugging Face checkpoint whose pruned layers are stored as `values` and
`codes`, and whose config.json says so: after `import proxsparse`, from_pretrained reads it as a
sparse model. Everything else in the directory is as `prune` wrote it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.config import check_scheme
from proxsparse.errors import ProxsparseError
from proxsparse.inference.sparse_linear import FORMS, FP8_FORMS, SparseLinear, sparse_layers
from proxsparse.inference.sparsify import densify_, sparsify_
from proxsparse.jobs.card import write_card
from proxsparse.jobs.output import (
    check_output_fits,
    output_directory,
    stored_report,
    write_report,
)
from proxsparse.models.checkpoint_files import (
    Change,
    open_checkpoint,
    place_of,
    read_tensor,
    write_checkpoint,
)
from proxsparse.models.forms import read_report
from proxsparse.models.fp8 import is_scale, read_scale
from proxsparse.models.loading import LoadedModel, load_model, state_bytes
from proxsparse.ops.reference import FP8, dequantize_fp8


def pack(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    keep_dense: bool = False,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Write a pruned checkpoint with its 2:4 layers packed.

    Args:
        model: a dense checkpoint whose layers are 2:4, such as `prune` writes; directory or name on
            the Hub. One in FP8 (scheme FP8_DYNAMIC) keeps its values and scales bit by bit; layers
            of it that are not 2:4 are written in the model's dtype.
        output: directory to create; must not exist, or be empty.
        keep_dense: whether the layers hold the dense weights too once loaded, see `sparse_linear`.
        quantize: "FP8_DYNAMIC" to round the packed layers to FP8; None keeps what the files have.

    Returns:
        {"layers": [{name, shape, dense_bytes, packed_bytes}], "left_dense": {name: reason},
        "dense_bytes", "packed_bytes": of these layers, "checkpoint_bytes": [before, after]}, which
        proxsparse.json holds too.

    Raises:
        ProxsparseError: packed already, no layer is 2:4, or the output cannot be written.
    """
    check_scheme(quantize)
    with output_directory(output) as partial:
        loaded = load_model(model, torch.device("cpu"))
        if sparse_layers(loaded.model):
            raise ProxsparseError(f"{model} is packed already")
        before = state_bytes(loaded.model)
        report = sparsify_(
            loaded.model,
            keep_dense=keep_dense,
            quantize=quantize or loaded.scheme,
            scales=loaded.scales,
        )
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
        entry = loaded.model.config.quantization_config.to_dict()
        _write(loaded, partial, _packing(loaded), entry, "packed", packed=result)
    return result


def unpack(model: str | os.PathLike[str], output: str | os.PathLike[str]) -> dict[str, Any]:
    """Write a packed checkpoint as the dense one it was made from, bit by bit.

    One in FP8 becomes the dense model of the rounded weights, in the dtype it computes in.

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
        change = _unpacking(loaded)
        names = densify_(loaded.model)
        if not names:
            raise ProxsparseError(f"{model} is not packed: its layers are dense already")
        _write(loaded, partial, change, None, "dense")
    return {"layers": list(names), "checkpoint_bytes": [before, state_bytes(loaded.model)]}


def _packing(loaded: LoadedModel) -> Change:
    """What becomes of the files of a dense model whose layers are sparse by now."""
    from proxsparse.inference.quantizer import empty_weight

    files = open_checkpoint(loaded.id, loaded.revision)
    places = {}
    dtype = loaded.model.dtype
    for name, layer in sparse_layers(loaded.model).items():
        place = place_of(loaded.model, f"{name}.weight", files.shapes)
        shape = (layer.out_features, layer.in_features)
        if files.shapes.get(place) != (shape[::-1] if layer.is_conv1d else shape):
            raise _not_as_loaded(loaded, name)
        places[place] = name, layer

    def change(place: str, stored: Tensor) -> dict[str, Tensor]:
        if loaded.scales and is_scale(place, files):
            return {}
        if place not in places:
            if stored.dtype == FP8:
                scale = read_scale(files, place, stored.shape[0])
                stored = dequantize_fp8(stored, scale, dtype)
            return {place: stored}
        name, layer = places[place]
        w = stored.T.contiguous() if layer.is_conv1d else stored
        forms = _forms(layer, w, name in loaded.scales)
        if forms is None:
            raise _not_as_loaded(loaded, name)
        owner = place.removesuffix("weight")
        return {f"{owner}{form}": x for form, x in forms.items()} | {place: empty_weight()}

    return change


def _forms(layer: SparseLinear, w: Tensor, is_rounded: bool) -> dict[str, Tensor] | None:
    """The packed form of a weight as the file has it, which may have more digits than the model.

    Args:
        layer: what was made of it in the model.
        w: [N, K]; in FP8, its values alone.
        is_rounded: whether the file has it in FP8.

    Returns:
        By name; None where it is not the weight of the layer.
    """
    if layer.weight_scale is None:
        if not torch.equal(w.to(layer.dtype), layer.weight):
            return None
        return dict(zip(FORMS, ops.pack_2to4(w), strict=True))
    scale = layer.weight_scale
    seen, seen_scale = (w, scale) if is_rounded else ops.quantize_fp8(w.to(layer.dtype))
    now = ops.unpack_2to4(layer.values, layer.codes)
    if seen.dtype != FP8 or not (
        torch.equal(seen.view(torch.uint8), now.view(torch.uint8))
        and torch.equal(seen_scale, scale)
    ):
        return None
    if not is_rounded:
        w, scale = ops.quantize_fp8(w)
    return dict(zip(FP8_FORMS, (*ops.pack_2to4(w), scale), strict=True))


def _not_as_loaded(loaded: LoadedModel, name: str) -> ProxsparseError:
    return ProxsparseError(
        f"the files of {loaded.id} hold {name} joined with other weights, in pieces or permuted, "
        "which cannot be packed: load it with transformers, write it with "
        "save_pretrained(..., save_original_format=False), and pack that"
    )


def _unpacking(loaded: LoadedModel) -> Change:
    """What becomes of the files of a packed model."""
    files = open_checkpoint(loaded.id, loaded.revision)
    places = {}
    for name, layer in sparse_layers(loaded.model).items():
        values = place_of(loaded.model, f"{name}.values", files.shapes)
        places[values] = layer.is_conv1d, layer.dtype
    dropped = {
        f"{values.removesuffix('values')}{form}"
        for values in places
        for form in ("codes", "weight", "weight_scale")
    }

    def change(name: str, stored: Tensor) -> dict[str, Tensor]:
        if name in dropped:
            return {}
        if name not in places:
            return {name: stored}
        owner = name.removesuffix("values")
        w = ops.unpack_2to4(stored, read_tensor(files, f"{owner}codes"))
        is_conv1d, dtype = places[name]
        if w.dtype == FP8:
            w = dequantize_fp8(w, read_scale(files, f"{owner}weight", w.shape[0]), dtype)
        return {f"{owner}weight": w.T if is_conv1d else w}

    return change


def _write(
    loaded: LoadedModel,
    directory: Path,
    change: Change,
    entry: dict[str, Any] | None,
    storage: str,
    **fields: Any,
) -> None:
    """Write the checkpoint with its tensors changed, and the report that lay beside it."""
    files = open_checkpoint(loaded.id, loaded.revision)
    check_output_fits(directory, loaded.model)
    before = read_report(files.directory)
    report = stored_report(before, storage, **fields)
    write_report(directory, report)
    if before is not None:  # else the card that lies there tells more than we know
        write_card(directory, report, files.directory, is_same_model=True)
    write_checkpoint(files, directory, change, quantization_config=entry, with_ours=True)
