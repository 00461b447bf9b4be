"""Recovery: a pruned model's kept weights learn on, towards the dense model it came from.

From a pruned directory and its base to another pruned directory, with the same masks. The base
says what to learn, and gives everything that is not pruned; the pruned directory gives the masks
and the weights to begin with, which may be the base's or not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from proxsparse.data.calibration import Calibration
from proxsparse.errors import ProxsparseError
from proxsparse.inference.sparsify import densify_
from proxsparse.jobs.checks import check_model, check_output, recovery_output, recovery_settings
from proxsparse.jobs.output import (
    check_output_fits,
    claim,
    mask_metadata,
    output_directory,
    pruned_report,
    write_result,
)
from proxsparse.jobs.prune import (
    PruneResult,
    data_report,
    load_data,
    run_method,
    settle_memory,
    shard,
)
from proxsparse.jobs.recipe import Recipe, make_recipe
from proxsparse.jobs.rounding import refuse_fp8
from proxsparse.learning import distributed
from proxsparse.learning.checkpoint import Checkpoints
from proxsparse.learning.job import Job
from proxsparse.methods import RECOVERY
from proxsparse.methods.recover import recover as recovery
from proxsparse.models.checkpoint_files import open_checkpoint
from proxsparse.models.forms import read_report
from proxsparse.models.loading import check_finite, load_model, resolve_device
from proxsparse.models.masks import Masks, mask_file, masks_of, model_fingerprint, targets_of
from proxsparse.models.rewriting import FileTargets
from proxsparse.models.targets import Targets


def recover(
    model: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    calibration: Any = None,
    resume: bool = False,
    **settings: Any,
) -> PruneResult:
    """Train the kept weights of a pruned model on, towards its dense base; the masks stay.

    They minimise the KL divergence of the next token's distribution from the base's. Only the
    weights of pruned layers change; everything else is the base's, bitwise. The result is a
    directory like that of `prune`; its report says that kept weights are not the base's.

    Args:
        model: the pruned model, dense with zeros or packed: a directory or a Hub name. Its kept
            weights may differ from the base's already, after SparseGPT or an earlier recovery.
        base: the dense model that it came from.
        output: directory to create; default the pruned one's name with "-recovered".
        calibration: as for `learn_masks`; default the setting of the same name.
        resume: go on from the last checkpoint of the same job, if there is one.
        **settings: any field of the config dataclasses, but for layers, which the masks name. lr
            is in units of a layer's kept weights.

    Raises:
        ProxsparseError: bad input; the two are no pruned model and its base.
        Interrupted: stopped on request, resumable.

    Cost: a step is one of gates. Bytes per pruned weight: 14 (fast) or 6 (balanced).
    """
    if isinstance(calibration, str | os.PathLike):
        settings["calibration"] = os.fspath(calibration)
        calibration = None
    recipe = make_recipe(RECOVERY, **recovery_settings(settings))
    check_model(model)
    check_model(base)
    output = recovery_output(model) if output is None else output
    check_output(output, resume=resume)
    device = distributed.own_device(resolve_device(recipe.run.device))
    several = distributed.world_size() > 1
    with distributed.joined(device), output_directory(output, resume=resume) as partial:
        began = time.perf_counter()
        home = torch.device("cpu") if several else device
        dense = load_model(base, home)
        refuse_fp8(dense, "recover")
        pruned = _read_pruned(model, dense.model, base)
        targets = targets_of(dense.model, pruned.masks)
        check_finite(targets)
        _check_dense(targets, pruned.masks, model, base)
        recipe = recipe.for_model(dense.model, distributed.world_size())
        recipe = settle_memory(recipe, dense.model, targets, device)
        check_output_fits(partial, dense.model, targets)
        if not dense.is_made:  # what cannot be written is said before the work
            FileTargets(dense.model, targets, open_checkpoint(dense.id, dense.revision))
        source = recipe.calibration.calibration if calibration is None else calibration
        data = load_data(source, dense.tokenizer, recipe, dense.model)
        assert data is not None
        fingerprint = model_fingerprint(targets)
        identity = recipe.key(fingerprint, pruned.fingerprint, data.fingerprint)
        claim(partial, identity)
        checkpoints = Checkpoints(partial / "checkpoints", identity)
        metrics = partial / "metrics.jsonl" if distributed.is_main() else None
        if several:
            shard(dense.model, targets, recipe, device)
        weights, history = recover_weights(
            *(dense.model, targets, pruned.masks, pruned.weights, data, recipe),
            *(checkpoints, metrics, resume),
        )
        masks = Masks(pruned.masks.codes, pruned.masks.shapes)
        if not distributed.is_main():
            return PruneResult(masks, {}, history)
        if several:
            dense = load_model(base, home)
            targets = targets_of(dense.model, masks)
        masks.metadata.update(mask_metadata(recipe, fingerprint, dense.id, dense.revision))
        report = pruned_report(
            recipe.as_dict(),
            dense,
            fingerprint,
            targets,
            masks,
            data=data_report(data),
            recovered_from={
                "id": pruned.id,
                "fingerprint": pruned.fingerprint,
                "recipe": pruned.recipe,
            },
            weights_updated=True,
            seconds=round(time.perf_counter() - began, 2),
        )
        for target in targets.layers:
            target.set_weight_(weights[target.name].to(target.parameter))
        write_result(partial, dense, masks, report, history)
    return PruneResult(masks, report, history)


def recover_weights(
    model: nn.Module,
    targets: Targets,
    masks: Masks,
    weights: Mapping[str, Tensor],
    data: Calibration,
    recipe: Recipe,
    checkpoints: Checkpoints | None = None,
    metrics: Path | None = None,
    resume: bool = False,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Recovery on a model in memory, which is the dense one before and after.

    Args:
        model: the dense model.
        targets: the pruned layers.
        masks: theirs.
        weights: target name -> the pruned weight [N, K] or [E, N, K] to begin with.
        data: the calibration blocks.
        recipe: of `RECOVERY`.
        checkpoints: where to checkpoint.
        metrics: path of metrics.jsonl.
        resume: go on from the last checkpoint.

    Returns:
        Target name -> the learned weight on the CPU, +0.0 where it is pruned, in the dtype that was
        computed in; and the history.
    """
    learned: dict[str, Tensor] = {}

    def run(job: Job) -> Masks:
        learned.update(recovery(job, masks, weights))
        return masks

    _, history = run_method(
        model, targets, data, recipe, checkpoints, metrics, resume=resume, run=run
    )
    return learned, history


@dataclass(frozen=True)
class _Pruned:
    """What a pruned checkpoint holds beyond its base.

    Attributes:
        id: its path or name.
        masks: which weights are kept.
        weights: target name -> weight, on the CPU.
        fingerprint: of these weights.
        recipe: how it was made, as its report says; empty if there is none.
    """

    id: str
    masks: Masks
    weights: dict[str, Tensor]
    fingerprint: str
    recipe: dict[str, Any]


@torch.no_grad()
def _read_pruned(model: str | os.PathLike[str], dense: nn.Module, base: Any) -> _Pruned:
    """Read a pruned checkpoint and compare it with its base.

    Raises:
        ProxsparseError: it is not pruned, not as its mask file says, or made from another base.
    """
    loaded = load_model(model, torch.device("cpu"))
    densify_(loaded.model)
    file = mask_file(Path(loaded.id))
    masks = masks_of(loaded.model) if file is None else Masks.load(file)
    targets = targets_of(loaded.model, masks)
    check_finite(targets)
    for target in targets.layers:
        if bool(target.weight()[~masks[target.parameter_name]].any()):
            raise ProxsparseError(
                f"{target.name} of {model} is not zero where {file} says that it is pruned: remove "
                "that file to take the masks from the zeros, or prune again"
            )
    _check_same_elsewhere(loaded.model, dense, targets, model, base)
    weights = {target.name: target.weight() for target in targets.layers}
    report = read_report(Path(loaded.id)) or {}
    return _Pruned(
        loaded.id, masks, weights, model_fingerprint(targets), dict(report.get("recipe", {}))
    )


def _check_same_elsewhere(
    pruned: nn.Module, dense: nn.Module, targets: Targets, model: Any, base: Any
) -> None:
    """Refuse a base that differs in what is not pruned: the result would be a mixture of both.

    Raises:
        ProxsparseError: names the first difference.
    """
    ours, theirs = pruned.state_dict(), dense.state_dict()
    changed = {id(t.parameter) for t in targets.layers}
    mine = dict(pruned.named_parameters(remove_duplicate=False))
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            here, there = (_kind(x) for x in (a, b))
            raise ProxsparseError(
                f"{model} was not made from {base}: its {name} is {here}, the base's {there}; give "
                "the dense model that was pruned"
            )
        if id(mine.get(name)) not in changed and not torch.equal(a, b.cpu()):
            raise ProxsparseError(
                f"{model} was not made from {base}: {name} differs, and is not pruned; give the "
                "dense model that was pruned"
            )


def _check_dense(targets: Targets, masks: Masks, model: Any, base: Any) -> None:
    """Refuse a base that is zero wherever the model is pruned: there is nothing to learn from it.

    Raises:
        ProxsparseError: it is the pruned model again, or another one under the same masks.
    """
    if not any(
        bool(t.weight()[~masks[t.parameter_name].to(t.parameter.device)].any())
        for t in targets.layers
    ):
        raise ProxsparseError(
            f"{base} is zero wherever {model} is pruned, so it is no dense model to learn from: "
            "give the one that was pruned"
        )


def _kind(x: Tensor | None) -> str:
    return "not there" if x is None else f"{list(x.shape)} of {x.dtype}"
