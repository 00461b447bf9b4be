"""What is in a checkpoint: which layers are 2:4, how sparse they are, what was kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from proxsparse import ops
from proxsparse.errors import ProxsparseError
from proxsparse.inference.sparsify import densify_
from proxsparse.models.forms import read_report
from proxsparse.models.loading import load_model
from proxsparse.models.masks import Masks, mask_file
from proxsparse.models.targets import Target, find_targets


@torch.no_grad()
def inspect_model(
    model: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Look at every prunable layer of a checkpoint.

    Args:
        model: directory or Hub name of any causal LM, pruned or not.
        base: the dense model it came from; lets the kept weights be compared with the originals.

    Returns:
        {"layers": [{name, shape, is_2to4, zeros, negative_zeros, overlap_with_magnitude,
        kept_bitwise}], "num_2to4": .., "num_layers": .., "num_packed": .., "mask_file": ..}. The
        last two columns of a layer are None when neither `base` nor a report beside the checkpoint
        tells them; mask_file is "matches", "differs" or None (there is none). A packed checkpoint
        is looked at unpacked.
    """
    cpu = torch.device("cpu")
    loaded = load_model(model, cpu)
    num_packed = len(densify_(loaded.model))
    targets = find_targets(loaded.model)
    originals: dict[str, Target] = {}
    if base is not None:
        original = load_model(base, cpu).model
        densify_(original)
        originals = {t.parameter_name: t for t in find_targets(original).layers}
    recorded = _recorded_overlap(Path(loaded.id))
    rows = []
    for target in targets.layers:
        w = target.weight()
        row: dict[str, Any] = {
            "name": target.name,
            "shape": list(target.shape),
            "is_2to4": bool(ops.is_2to4(w)),
            "zeros": round((w == 0).float().mean().item(), 4),
            "negative_zeros": int(((w == 0) & w.signbit()).sum()),
            "overlap_with_magnitude": recorded.get(target.name),
            "kept_bitwise": None,
        }
        if base is not None:
            row.update(_against(target, originals, base))
        rows.append(row)
    return {
        "layers": rows,
        "num_2to4": sum(row["is_2to4"] for row in rows),
        "num_layers": len(rows),
        "num_packed": num_packed,
        "mask_file": _compare_mask_file(Path(loaded.id), targets.layers),
    }


def _against(target: Target, originals: dict[str, Target], base: Any) -> dict[str, Any]:
    original = originals.get(target.parameter_name)
    if original is None or original.shape != target.shape:
        raise ProxsparseError(
            f"{base} has no {target.parameter_name} of shape {list(target.shape)}"
        )
    w, w0 = target.weight(), original.weight()
    kept = w != 0
    by_magnitude = ops.mask_2to4(w0)
    share = (kept & by_magnitude).sum() / kept.sum().clamp_min(1)
    return {
        "overlap_with_magnitude": round(share.item(), 4),
        "kept_bitwise": bool((w[kept] == w0[kept]).all()),
    }


def _recorded_overlap(directory: Path) -> dict[str, float | None]:
    layers = (read_report(directory) or {}).get("layers", [])
    return {layer["name"]: layer.get("overlap_with_magnitude") for layer in layers}


def _compare_mask_file(directory: Path, layers: tuple[Target, ...]) -> str | None:
    file = mask_file(directory)
    if file is None:
        return None
    masks = Masks.load(file)
    weights = {t.parameter_name: t.weight() for t in layers}
    same = all(name in weights and not weights[name][~masks[name]].any() for name in masks)
    return "matches" if same else "differs"
