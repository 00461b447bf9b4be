"""Checkpoints of scheme FP8_DYNAMIC as compressed-tensors writes them, read without that library.

Each linear layer has an e4m3 `weight` [N, K] and a `weight_scale` [N, 1]; activations have no
tensors, since their scales are found token by token. Such a model is loaded as what it stands for,
a dense one with rounded weights, and its scales are kept beside it: with them, rounding gives back
the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from proxsparse.config import FP8_DYNAMIC
from proxsparse.errors import ProxsparseError
from proxsparse.models.checkpoint_files import (
    QUANTISATION,
    CheckpointFiles,
    place_of,
    read_tensor,
)
from proxsparse.models.files import read_json
from proxsparse.ops.reference import dequantize_fp8

SCALE = "weight_scale"
# Of a group of layers in the entry: what a scheme is, by the names of compressed-tensors.
_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
_ACTIVATIONS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def find_entry(config: Any) -> dict[str, Any] | None:
    """The entry of a config.json that says FP8_DYNAMIC; None if it says nothing, or another scheme.

    Args:
        config: the parsed JSON.
    """
    if not isinstance(config, dict):
        return None
    for key in QUANTISATION:
        entry = config.get(key)
        if isinstance(entry, dict) and _is_fp8_dynamic(entry):
            return entry
    return None


def stored_entry(directory: Path) -> dict[str, Any] | None:
    """`find_entry` of a local directory; None where there is no config.json."""
    path = directory / "config.json"
    return find_entry(read_json(path)) if path.is_file() else None


def _is_fp8_dynamic(entry: dict[str, Any]) -> bool:
    groups = entry.get("config_groups")
    sparsity = entry.get("sparsity_config") or {}
    return (
        entry.get("quant_method") == "compressed-tensors"
        and entry.get("format") in ("float-quantized", "naive-quantized")
        and isinstance(sparsity, dict)
        and sparsity.get("format", "dense") == "dense"  # else the zeros are not stored
        and isinstance(groups, dict)
        and bool(groups)
        and all(_is_group_of_ours(group) for group in groups.values())
    )


def _is_group_of_ours(group: Any) -> bool:
    def agrees(part: Any, expected: dict[str, Any]) -> bool:
        return isinstance(part, dict) and all(
            part.get(key) == value for key, value in expected.items()
        )

    return (
        isinstance(group, dict)
        and agrees(group.get("weights"), _WEIGHTS)
        and not group["weights"].get("dynamic")
        and agrees(group.get("input_activations"), _ACTIVATIONS)
        and group.get("output_activations") is None
    )


@torch.no_grad()
def scale_weights_(model: nn.Module, files: CheckpointFiles) -> dict[str, Tensor]:
    """Make a model whose weights are the e4m3 numbers of its files what those stand for.

    Args:
        model: loaded from `files` with e4m3 numbers cast to its own dtype, which is exact.
        files: the checkpoint.

    Returns:
        Name of each layer that is in FP8 -> its scales, float32 [N], on the CPU.

    Raises:
        ProxsparseError: an FP8 tensor without a scale or a layer of the model, or unsound scales.

    Cost: a layer's weight in float32 at a time.
    """
    waiting, scales = set(fp8_weights(files)), {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        place = place_of(model, f"{name}.weight", files.weight_map)
        if place not in waiting:
            continue
        waiting.remove(place)
        scales[name] = scale = read_scale(files, place, module.out_features)
        w = module.weight.detach()
        w.copy_(dequantize_fp8(w, scale.to(w.device), w.dtype))
    if waiting:
        raise ProxsparseError(
            f"{files.directory} holds {min(waiting)} in FP8, which is the weight of no linear "
            f"layer of {type(model).__name__}: only linear layers can be read in FP8"
        )
    return scales


def fp8_weights(files: CheckpointFiles) -> Iterator[str]:
    """Names of the e4m3 tensors of a checkpoint."""
    from safetensors import safe_open

    for file_name in sorted(set(files.weight_map.values())):
        with safe_open(str(files.directory / file_name), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                if file.get_slice(name).get_dtype() == "F8_E4M3":
                    yield name


def read_scale(files: CheckpointFiles, weight: str, rows: int) -> Tensor:
    """The scales of an e4m3 weight in the files, float32 [N].

    Raises:
        ProxsparseError: there are none, or not one positive number for each row.
    """
    name = scale_name(weight)
    if name not in files.weight_map:
        raise ProxsparseError(
            f"{files.directory} holds {weight} in FP8 and no {name}: it is incomplete, or of "
            f"another scheme than {FP8_DYNAMIC}"
        )
    scale = read_tensor(files, name).float()
    if scale.numel() != rows or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ProxsparseError(
            f"{name} in {files.directory} is {list(scale.shape)}: {FP8_DYNAMIC} has a positive "
            f"scale for each of the {rows} rows"
        )
    return scale.reshape(rows)


def scale_name(weight: str) -> str:
    """Name of the scales of a weight in the files."""
    return weight.removesuffix("weight") + SCALE


def is_scale(name: str, files: CheckpointFiles) -> bool:
    """Whether a tensor holds the scales of a weight in the same files."""
    return name.endswith(SCALE) and name.removesuffix(SCALE) + "weight" in files.weight_map
