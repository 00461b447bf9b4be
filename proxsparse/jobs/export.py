"""A pruned model as an ordinary FP8 checkpoint, for programs that know nothing of 2:4.

Every linear layer of the decoder blocks becomes e4m3 numbers and a scale for each row, as
compressed-tensors has them in its scheme FP8_DYNAMIC; pruned weights are zeros among them. vLLM,
SGLang and transformers load such a directory as a dense FP8 model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from proxsparse import ops
from proxsparse.config import FP8_DYNAMIC, TargetConfig, check_scheme
from proxsparse.errors import ProxsparseError
from proxsparse.inference.sparse_linear import FP8_FORMS, sparse_layers
from proxsparse.inference.sparsify import densify_, why_not_sparse
from proxsparse.jobs.output import check_output_fits, output_directory, stored_report, write_report
from proxsparse.models.checkpoint_files import (
    Change,
    CheckpointFiles,
    open_checkpoint,
    place_of,
    read_tensor,
    write_checkpoint,
)
from proxsparse.models.forms import read_report
from proxsparse.models.fp8 import scale_name
from proxsparse.models.loading import load_model, state_bytes
from proxsparse.models.targets import Target, find_targets
from proxsparse.ops.reference import FP8


def export(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = FP8_DYNAMIC,
    targets: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Write a model as a dense FP8 checkpoint.

    Args:
        model: directory or name on the Hub: dense or packed, pruned or not. What was packed in FP8
            keeps its values and scales bit by bit.
        output: directory to create; must not exist, or be empty.
        format: "FP8_DYNAMIC".
        targets: patterns of layers to write in FP8, see `find_targets`; by default every linear
            layer of the decoder blocks.
        ignore: patterns of layers to leave as they are.

    Returns:
        {"layers": names of those in FP8, "left_dense": {name: reason}, "num_2to4": how many of them
        are 2:4, "checkpoint_bytes": [before, after]}.

    Raises:
        ProxsparseError: in FP8 already, a layer that the scheme does not know, NaN or infinite
            weights, compressed-tensors is not installed, or the output cannot be written.
    """
    check_scheme(format, what="--format")
    with output_directory(output) as partial:
        loaded = load_model(model, torch.device("cpu"))
        if loaded.scheme is not None:
            raise ProxsparseError(f"{model} is a dense checkpoint in {FP8_DYNAMIC} already")
        files = open_checkpoint(loaded.id, loaded.revision)
        before = state_bytes(loaded.model)
        packed = _packed_places(loaded.model, files)
        densify_(loaded.model)
        found = find_targets(loaded.model, TargetConfig(targets=targets, ignore=ignore))
        check_linear(found.layers)
        entry = quantization_entry(loaded.model, [target.name for target in found.layers])
        places = set()
        for target in found.layers:
            place = place_of(loaded.model, target.parameter_name, files.weight_map)
            if tuple(files.shapes.get(place, ())) not in (target.shape, (0,)):
                raise ProxsparseError(
                    f"{files.directory} holds {target.name} joined with other weights, in pieces "
                    "or permuted: load it with transformers, write it with save_pretrained, and "
                    "export that"
                )
            places.add(place)
        check_output_fits(partial, loaded.model)
        report = stored_report(read_report(files.directory), "dense", exported=format)
        write_report(partial, report)
        change = _exporting(files, packed, places)
        write_checkpoint(files, partial, change, quantization_config=entry, with_ours=True)
        after = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
        return {
            "layers": [target.name for target in found.layers],
            "left_dense": dict(found.left_dense),
            "num_2to4": sum(bool(ops.is_2to4(target.weight())) for target in found.layers),
            "checkpoint_bytes": [before, after],
        }


def check_linear(layers: Iterable[Target]) -> None:
    """Refuse weights that compressed-tensors' scheme has no place for.

    Raises:
        ProxsparseError: names the first one.
    """
    for target in layers:
        reason = why_not_sparse(target)
        if not reason and not isinstance(target.module, nn.Linear):
            reason = f"a {type(target.module).__name__}, stored transposed"
        if reason:
            raise ProxsparseError(
                f"{target.name} is {reason}: a dense checkpoint in {FP8_DYNAMIC} has plain linear "
                "layers only; leave it out with --ignore, or use pack --quantize instead"
            )


def quantization_entry(model: nn.Module, layers: Iterable[str]) -> dict[str, Any]:
    """What config.json says of a model with these layers in FP8, by compressed-tensors itself.

    Raises:
        ProxsparseError: compressed-tensors is not installed.
    """
    try:
        from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    except ImportError as error:
        raise ProxsparseError(
            f"a dense checkpoint in {FP8_DYNAMIC} is described by compressed-tensors, which cannot "
            f"be imported ({error}): pip install 'proxsparse[fp8]', or use pack --quantize, which "
            "does without"
        ) from error
    rounded = set(layers)
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in rounded
    ]
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(FP8_DYNAMIC, ["Linear"])},
        ignore=others,
        format="float-quantized",
        quantization_status="compressed",
    )
    entry: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return entry


def quantized(place: str, w: Tensor) -> dict[str, Tensor]:
    """The tensors of a dense weight [N, K] in FP8, by their names in the files."""
    try:
        values, scale = ops.quantize_fp8(w)
    except ProxsparseError as error:
        raise ProxsparseError(f"{place} {str(error).removeprefix('w ')}") from error
    return {place: values, scale_name(place): scale.unsqueeze(-1)}


def _packed_places(model: nn.Module, files: CheckpointFiles) -> dict[str, str]:
    """Of each tensor of a packed layer in the files, the place of that layer's dense weight."""
    places: dict[str, str] = {}
    for name in sparse_layers(model):
        values = place_of(model, f"{name}.values", files.weight_map)
        owner = values.removesuffix("values")
        places |= dict.fromkeys(
            (f"{owner}{form}" for form in (*FP8_FORMS, "weight")), f"{owner}weight"
        )
    return places


def _exporting(files: CheckpointFiles, packed: dict[str, str], layers: set[str]) -> Change:
    """What becomes of the tensors of the files."""

    def change(name: str, stored: Tensor) -> dict[str, Tensor]:
        place = packed.get(name, name)
        if name in packed:
            if not name.endswith("values"):
                return {}
            owner = name.removesuffix("values")
            stored = ops.unpack_2to4(stored, read_tensor(files, f"{owner}codes"))
            if stored.dtype == FP8:
                scale = read_tensor(files, f"{owner}weight_scale").unsqueeze(-1)
                return {place: stored, scale_name(place): scale}
        return quantized(place, stored) if place in layers else {place: stored}

    return change
