"""Pruning of weights that are, or become, FP8: they are rounded before masks are chosen."""

from __future__ import annotations

from typing import Any

import torch

from proxsparse import ops
from proxsparse.config import FP8_DYNAMIC
from proxsparse.errors import ProxsparseError
from proxsparse.jobs.export import check_linear, quantization_entry
from proxsparse.jobs.recipe import Recipe
from proxsparse.models.checkpoint_files import open_checkpoint
from proxsparse.models.fp8 import stored_entry
from proxsparse.models.loading import LoadedModel
from proxsparse.models.targets import Targets
from proxsparse.ops.reference import dequantize_fp8


@torch.no_grad()
def settle_fp8_(recipe: Recipe, base: LoadedModel, targets: Targets) -> dict[str, Any] | None:
    """Round the weights that are pruned, if the recipe asks for it, so that masks are chosen on it.

    Args:
        recipe: the settings.
        base: the model; its targets are changed.
        targets: what is pruned.

    Returns:
        What config.json of the result says of FP8; None for a result in the dtype of the base.

    Raises:
        ProxsparseError: the method changes kept weights, so they would not be the rounded ones; a
            target that a dense FP8 checkpoint has no place for; or compressed-tensors is missing.
    """
    if recipe.run.quantize is None and base.scheme is None:
        return None
    if recipe.method.updates_weights(recipe.options):
        raise ProxsparseError(
            f"{recipe.method.name} changes the weights it keeps, which in {FP8_DYNAMIC} stay as "
            "they were rounded: add --mask-only, or choose another --method"
        )
    if base.scheme is not None:
        return entry_of(base, targets)
    if base.is_made:
        raise ProxsparseError(
            "--quantize rounds the weights of safetensors files, and neither --random-init nor a "
            "GGUF file has any: leave it out, and round the result with pack --quantize"
        )
    check_linear(targets.layers)
    entry = quantization_entry(base.model, [target.name for target in targets.layers])
    for target in targets.layers:
        w = target.weight()
        target.set_weight_(dequantize_fp8(*ops.quantize_fp8(w), w.dtype))
    return entry


def entry_of(base: LoadedModel, targets: Targets) -> dict[str, Any] | None:
    """What the config.json of a checkpoint in FP8 says of it; None for any other.

    Raises:
        ProxsparseError: a target is not in FP8, though others are.
    """
    if base.scheme is None:
        return None
    outside = next((t.name for t in targets.layers if t.name not in base.scales), None)
    if outside is not None:
        raise ProxsparseError(
            f"{base.id} is in {base.scheme}, and {outside} of it is not: leave it out with --ignore"
        )
    return stored_entry(open_checkpoint(base.id, base.revision).directory)


def refuse_fp8(base: LoadedModel, what: str) -> None:
    """Refuse a checkpoint in FP8 where kept weights change, which its scales do not foresee.

    Args:
        base: the model.
        what: would change them.

    Raises:
        ProxsparseError: it is in FP8.
    """
    if base.scheme is not None:
        raise ProxsparseError(
            f"{base.id} is in {base.scheme}, and {what} changes the weights it keeps: give the "
            "model in 16 bits, and round the result with pack --quantize"
        )
