"""Masks in memory, on disk, and onto a model.

A mask is kept as one 4-bit code per group of four weights: 1 bit per weight, the size and the order
in which sparse tensor cores want it. `proxsparse.masks` (in the format of safetensors, but with a
name that no loader of weights takes for some) holds the codes of each layer and, as
metadata, which base model they belong to (by content hash) and how they were made.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from proxsparse import ops
from proxsparse.errors import ProxsparseError
from proxsparse.models.forms import MaskHeader, checked
from proxsparse.models.offload import in_memory
from proxsparse.models.targets import (
    Target,
    Targets,
    check_in_memory,
    find_targets,
)
from proxsparse.ops import reference

FORMAT = "proxsparse-masks-1"
FILE = "proxsparse.masks"
OLD_FILE = "masks.safetensors"


@dataclass(frozen=True, repr=False)
class Masks(Mapping[str, Tensor]):
    """A 2:4 mask for each of a model's layers; masks[name] is bool [N, K] or [E, N, K].

    Attributes:
        codes: parameter name -> uint8 [ceil(numel/8)], see `reference.mask_to_codes`.
        shapes: parameter name -> canonical shape, groups along the last dimension.
        metadata: strings that travel with the file: base model, method, settings.
    """

    codes: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def add(self, target: Target, mask: Tensor) -> None:
        """Add the mask of one layer, bool in the canonical shape."""
        self.codes[target.parameter_name] = reference.mask_to_codes(mask.reshape(-1)).cpu()
        self.shapes[target.parameter_name] = tuple(mask.shape)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return reference.codes_to_mask(self.codes[name], _numel(shape)).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.codes)

    def __len__(self) -> int:
        return len(self.codes)

    def __repr__(self) -> str:
        count = sum(map(_numel, self.shapes.values()))
        return f"Masks: {len(self)} layers, 50 % of {_in_words(count)} weights"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the safetensors file (1 bit per weight)."""
        from safetensors.torch import save_file

        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        metadata = {**self.metadata, "format": FORMAT, "shapes": json.dumps(shapes)}
        save_file(self.codes, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read and check a mask file, or the one in a directory.

        Raises:
            ProxsparseError: not there, not a mask file, truncated, or a code that is not 2:4.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path).expanduser()
        if path.is_dir():
            path = mask_file(path) or path / FILE
        if not path.is_file():
            raise ProxsparseError(f"there is no mask file {path}")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = dict(file.metadata() or {})
                codes = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ProxsparseError(
                f"{path} cannot be read as safetensors ({error}): it is truncated or another kind "
                "of file; write it again with proxsparse prune"
            ) from error
        if metadata.get("format") != FORMAT:
            raise ProxsparseError(f"{path} is a safetensors file, but holds no proxsparse masks")
        header = checked(MaskHeader, metadata, f"the metadata of {path}")
        shapes = {name: tuple(shape) for name, shape in header.shapes.items()}
        if shapes.keys() - codes.keys():
            odd = min(shapes.keys() - codes.keys())
            raise ProxsparseError(
                f"{path} has a shape of {odd!r} but no codes: it is damaged; write it again with "
                "proxsparse prune"
            )
        for known in ("format", "shapes"):
            del metadata[known]
        masks = cls(codes, shapes, metadata)
        for name in codes:
            masks._check(name, path)
        return masks

    def _check(self, name: str, path: Path) -> None:
        codes, shape = self.codes[name], self.shapes.get(name)
        groups = math.prod(shape) // 4 if shape and shape[-1] % 4 == 0 else -1
        if codes.dtype != torch.uint8 or list(codes.shape) != [(groups + 1) // 2]:
            raise ProxsparseError(
                f"{path}: {name} has {codes.numel()} bytes of codes, which is not its shape {shape}"
            )
        check_codes(codes, groups, f"{path}: {name}")


def mask_file(directory: Path) -> Path | None:
    """The mask file in a directory that we wrote, by its name of today or of old; None if none."""
    files = (directory / name for name in (FILE, OLD_FILE))
    return next((file for file in files if file.is_file()), None)


def check_codes(codes: Tensor, num_groups: int, name: str) -> None:
    """Refuse codes that do not keep two of four; decoding them would misplace weights in silence.

    Args:
        codes: uint8 [..., ceil(num_groups/2)], see `reference.mask_to_codes`.
        num_groups: groups in a row.
        name: what an error calls the tensor.

    Raises:
        ProxsparseError: names the first bad group, counted over all rows.
    """
    low, high = codes & 15, codes >> 4
    if num_groups % 2:  # the last byte of a row holds one group
        high[..., -1] = 4
    if bool((_is_valid(low) & _is_valid(high)).all()):
        return
    nibbles = torch.stack((low, high), -1).flatten(-2)[..., :num_groups].flatten()
    group = int((~_is_valid(nibbles)).nonzero()[0])
    raise ProxsparseError(
        f"{name} is not 2:4: group {group} has code {int(nibbles[group])}, which does not keep "
        "two of four"
    )


def _is_valid(nibbles: Tensor) -> Tensor:
    """Whether each is the code of a group, i | j << 2 with i < j."""
    return (nibbles & 3) < (nibbles >> 2)


def _in_words(count: int) -> str:
    """A number of weights, such as 3.0 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def model_fingerprint(targets: Targets) -> str:
    """sha256 over the names, dtypes, shapes and bytes of every target's weight.

    Only the weights that a mask refers to count: a changed chat template is still the same base.
    """
    check_in_memory(targets.layers)
    digest = hashlib.sha256()
    for target in sorted(targets.layers, key=lambda t: t.parameter_name):
        w = target.parameter.detach()
        digest.update(f"{target.parameter_name} {w.dtype} {tuple(w.shape)}\n".encode())
        digest.update(w.cpu().contiguous().view(torch.uint8).flatten().numpy().data)
    return digest.hexdigest()


def targets_of(model: nn.Module, masks: Masks) -> Targets:
    """The layers of `model` that `masks` belong to.

    Raises:
        ProxsparseError: no plain causal LM, or a mask names a layer that the model lacks, or has
            another shape.
    """
    # What a file calls a layer is its name, whatever pattern or class it reads like.
    try:
        everything = find_targets(model, names=frozenset(masks))
    except ProxsparseError as error:
        raise ProxsparseError(f"the masks were made for another model: {error}") from error
    by_name = {t.parameter_name: t for t in everything.layers}
    for name, shape in masks.shapes.items():
        if by_name[name].shape != shape:
            raise ProxsparseError(
                f"the mask of {name} has shape {list(shape)}, the model's weight "
                f"{list(by_name[name].shape)}: it was made for another model"
            )
    layers = tuple(t for t in everything.layers if t.parameter_name in masks.shapes)
    return Targets(layers, everything.left_dense, everything.blocks, everything.block_names)


def apply_masks_(model: nn.Module, masks: Masks) -> None:
    """Zero the pruned weights of `model` in place.

    Kept weights stay bitwise what they are, pruned ones become exact +0.0. Memory: one layer's
    mask.

    Args:
        model: the base model.
        masks: from `learn_masks` or `Masks.load`.

    Raises:
        ProxsparseError: a mask fits no layer of the model, or a layer is offloaded by accelerate;
            nothing is changed then.
    """
    targets = targets_of(model, masks)
    check_in_memory(targets.layers)
    with torch.no_grad():
        for target in targets.layers:
            w = target.weight()
            mask = masks[target.parameter_name].to(w.device)
            zero = torch.zeros((), dtype=w.dtype, device=w.device)
            target.set_weight_(torch.where(mask, w, zero))


@torch.no_grad()
def masks_of(model: nn.Module) -> Masks:
    """The masks that a pruned model's zeros show.

    A group with fewer than two non-zeros keeps zeros at its lowest free places, as when packed.
    Layers that accelerate has offloaded are brought back one by one.

    Args:
        model: a dense model, pruned. Layers that are not 2:4 get no mask, nor do those that are
            zero throughout: they were made so, such as a new branch, and are yet to be trained.

    Raises:
        ProxsparseError: no layer is 2:4.
    """
    masks = Masks()
    for target in find_targets(model).layers:
        with in_memory(target.module):
            check_in_memory((target,))
            w = target.weight()
            if ops.is_2to4(w) and w.any():
                masks.add(target, ops.mask_2to4(w))
    if not masks:
        raise ProxsparseError(
            f"no layer of {type(model).__name__} is 2:4, so it shows no masks: prune it first"
        )
    return masks


def layer_report(targets: Targets, masks: Masks) -> list[dict[str, Any]]:
    """Per layer: name, shape, and the share of kept weights that magnitude keeps as well."""
    report = []
    for target in targets.layers:
        mask = masks[target.parameter_name]
        by_magnitude = ops.mask_2to4(target.weight()).cpu()
        overlap = (mask & by_magnitude).sum().item() / mask.sum().item()
        report.append(
            {
                "name": target.name,
                "shape": list(target.shape),
                "overlap_with_magnitude": round(overlap, 4),
            }
        )
    return report
