"""Which tensors of a checkpoint's files a model's pruned weights are, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor, nn

from proxsparse import ops
from proxsparse.errors import ProxsparseError
from proxsparse.models.checkpoint_files import CheckpointFiles, in_file
from proxsparse.models.fp8 import scale_name
from proxsparse.models.masks import Masks
from proxsparse.models.targets import Target, Targets
from proxsparse.ops.reference import FP8

_KEPT = torch.ones((), dtype=torch.bool)  # expanded to any shape, it takes no memory
_CHANGED = torch.zeros((), dtype=torch.bool)


class FileTargets:
    """The places of a model's targets in the files it was loaded from.

    Args:
        model: loaded from `files`.
        targets: the weights that change.
        files: the checkpoint.

    Raises:
        ProxsparseError: a target has no counterpart of its shape in the files; it is named.
    """

    def __init__(self, model: nn.Module, targets: Targets, files: CheckpointFiles) -> None:
        self._model, self._files = model, files
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        of_parameter = {id(t.parameter): t for t in targets.layers}
        # A shared weight has several names, and the files may hold any of them.
        self._target_of = {
            name: of_parameter[id(p)]
            for name, p in self._parameters.items()
            if id(p) in of_parameter
        }
        self._groups: dict[str, list[str]] = {}
        for name in self._parameters:
            owner = next((b for b in targets.block_names if name.startswith(f"{b}.")), "")
            self._groups.setdefault(owner, []).append(name)
        self.group_of = self._locate(targets.layers)

    def _locate(self, targets: Iterable[Target]) -> dict[str, str]:
        """Name of each tensor in the files that changes -> the block it belongs to."""
        shapes, places, unknown, num_found = self._files.shapes, {}, [], 0
        for group in self._groups:
            marks = self._in_file(group, lambda _: _CHANGED, _KEPT)
            for name, mark in marks.items():
                changed = int((~mark).sum()) if mark.numel() else 0
                if changed and shapes.get(name) == tuple(mark.shape):
                    places[name] = group
                    num_found += changed
                elif changed:
                    unknown.append(name)
        expected = sum(t.parameter.numel() for t in targets)
        if num_found < expected:
            raise ProxsparseError(
                f"{self._files.directory} holds no {unknown[0] if unknown else 'tensor'} of the "
                f"shape that {type(self._model).__name__} has for it: the checkpoint keeps these "
                "weights in another form (quantised, say), in which they cannot be pruned. Load it "
                "with transformers, write it with save_pretrained, and prune that"
            )
        return places

    def _in_file(
        self, group: str, of_target: Callable[[Target], Tensor], other: Tensor | None
    ) -> dict[str, Tensor]:
        """What `of_target` makes of each target of a block, and `other` or itself of the rest."""
        tensors = {}
        for name in self._groups[group]:
            parameter, target = self._parameters[name], self._target_of.get(name)
            if target is not None:
                tensor = of_target(target)
                tensors[name] = tensor.expand(parameter.shape) if tensor.dim() == 0 else tensor
            else:
                tensors[name] = (
                    parameter.detach() if other is None else other.expand(parameter.shape)
                )
        return in_file(self._model, tensors, self._files.shapes)

    def masking(
        self, masks: Masks, *, in_fp8: bool = False
    ) -> Callable[[str, Tensor], dict[str, Tensor]]:
        """What becomes of a tensor of the files when the model, as it is now, is written.

        Kept weights that the model has not changed stay bitwise what they are in the file, in
        whatever dtype; pruned ones become +0.0. Everything else stays.

        Args:
            masks: of the targets.
            in_fp8: write them in FP8 instead. The weights of the files are rounded row by row
                before they are pruned, or are in FP8 already; the model's own do not count.
        """

        def mask(target: Target) -> Tensor:
            return target.canonical(masks[target.parameter_name])

        @lru_cache(maxsize=1)  # names come block by block
        def views(group: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            kept = self._in_file(group, mask, _KEPT)
            return kept, self._in_file(group, lambda t: t.parameter.detach(), None)

        def change(name: str, stored: Tensor) -> dict[str, Tensor]:
            group = self.group_of.get(name)
            if group is None:
                return {name: stored}
            kept, now = (view[name].cpu() for view in views(group))
            if in_fp8:
                return _mask_fp8(name, stored, kept)
            same = _bits(stored.to(now.dtype)) == _bits(now)
            new = torch.where(same, stored, now.to(stored.dtype))
            return {name: new.masked_fill_(~kept, 0)}

        return change


def _mask_fp8(name: str, stored: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """A weight of the files in FP8 under its mask; with its scales, where it had none."""
    if stored.dtype == FP8:
        return {name: _under_mask(stored, kept)}
    values, scale = ops.quantize_fp8(stored)
    return {name: _under_mask(values, kept), scale_name(name): scale.unsqueeze(-1)}


def _under_mask(values: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, values.view(torch.uint8), 0).to(torch.uint8).view(FP8)


def _bits(x: Tensor) -> Tensor:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(kind)
