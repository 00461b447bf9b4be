"""The main job: from a model and a text to masks, and to a pruned checkpoint on disk.

Everything is written into `OUTPUT.partial` and renamed to `OUTPUT` at the end, so an output
directory that exists is a finished one. The partial directory also holds the checkpoints a killed
run resumes from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from proxsparse.config import MethodConfig, replace
from proxsparse.data.calibration import Calibration, load_calibration
from proxsparse.errors import ProxsparseError
from proxsparse.jobs.checks import check_model, check_output
from proxsparse.jobs.output import (
    check_output_fits,
    claim,
    mask_metadata,
    output_directory,
    pruned_report,
    write_result,
)
from proxsparse.jobs.quality import Quality, why_not_measured
from proxsparse.jobs.recipe import Recipe, make_recipe
from proxsparse.jobs.rounding import entry_of, settle_fp8_
from proxsparse.learning import distributed
from proxsparse.learning.checkpoint import Checkpoints
from proxsparse.learning.job import Job
from proxsparse.learning.launcher import require_one_process
from proxsparse.learning.memory import choose_memory
from proxsparse.models.checkpoint_files import open_checkpoint
from proxsparse.models.loading import (
    LoadedModel,
    build_model,
    check_causal,
    check_finite,
    load_model,
    resolve_device,
)
from proxsparse.models.masks import Masks, apply_masks_, model_fingerprint, targets_of
from proxsparse.models.positions import text_config
from proxsparse.models.precision import computing_in, resolve_dtype
from proxsparse.models.rewriting import FileTargets
from proxsparse.models.targets import Targets, find_targets


@dataclasses.dataclass(frozen=True)
class PruneResult:
    """What a job did.

    Attributes:
        masks: the masks, with their metadata.
        report: everything that `proxsparse.json` holds.
        history: the metrics of a learned method, one dict per record of `metrics.jsonl`.
    """

    masks: Masks
    report: dict[str, Any]
    history: list[dict[str, float]]


def learn_masks(
    model: nn.Module,
    calibration: Any = None,
    tokenizer: Any = None,
    *,
    method: str | None = None,
    preset: str | None = None,
    config: MethodConfig | None = None,
    **settings: Any,
) -> Masks:
    """Choose a 2:4 mask for every target layer of a model in memory; the model is not changed.

    Args:
        model: a Hugging Face causal LM on the device to work on.
        calibration: a file, folder, "stdlib", "self" or Hub name; a list of texts; a
            `datasets.Dataset`; or an iterable of token batches. None takes the default setting, C4.
        tokenizer: the model's tokenizer; needed unless `calibration` is tokens already.
        method: one of `proxsparse.methods.METHODS`; default "gates", or that of `preset` or
            `config`.
        preset: published settings of the paper, see `proxsparse.jobs.recipe.PRESETS`.
        config: typed settings, e.g. GatesConfig(steps=200).
        **settings: the same by name, e.g. steps=200 or ignore=("down_proj",); they win.

    Returns:
        The masks; put them on the model with `apply_masks_`, or save them.

    Raises:
        ProxsparseError: bad input or settings.
    """
    recipe = _recipe(method, preset, config, settings).for_model(model)
    if recipe.method.updates_weights(recipe.options):
        raise ProxsparseError(
            f"{recipe.method.name} changes the weights it keeps, so its masks alone are not its "
            "result: pass mask_only=True, or use prune()"
        )
    if recipe.run.quantize is not None:
        raise ProxsparseError(
            f"quantize is {recipe.run.quantize!r}, which would round the model in memory: use "
            "prune(), or learn masks on a model that you have rounded"
        )
    targets = find_targets(model, recipe.targets)
    recipe = settle_memory(recipe, model, targets, next(model.parameters()).device)
    check_finite(targets)
    source = recipe.calibration.calibration if calibration is None else calibration
    data = load_data(source, tokenizer, recipe, model)
    masks, _ = run_method(model, targets, data, recipe)
    masks.metadata.update(mask_metadata(recipe, model_fingerprint(targets), "in memory", None))
    return masks


def prune(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    calibration: Any = None,
    method: str | None = None,
    preset: str | None = None,
    config: MethodConfig | None = None,
    resume: bool = False,
    quality: bool = True,
    **settings: Any,
) -> PruneResult:
    """Prune a Hugging Face causal LM to 2:4 and write the result to a directory.

    The directory holds a dense checkpoint with zeros (any Hugging Face program loads it), its
    tokenizer, `proxsparse.masks`, `proxsparse.json` (recipe, provenance, per-layer report) and,
    for learned methods, `metrics.jsonl` and `training.png`. With `quantize`, and of a model that is
    in FP8 already, it is a dense checkpoint in FP8, bitwise the masks on the rounded model.

    Args:
        model: local directory or Hub name.
        output: directory to create; must not exist, or be empty.
        calibration: as for `learn_masks`; default the setting of the same name.
        method: default "gates", or the preset's.
        preset: see `proxsparse.jobs.recipe.PRESETS`.
        config: typed settings, e.g. GatesConfig(steps=200).
        resume: go on from the last checkpoint of the same job, if there is one.
        quality: whether to measure perplexity before and after, on at most 16,384 tokens of the
            calibration text that the masks are not chosen on; a few seconds.
        **settings: any field of the config dataclasses; they win over `config`.

    Raises:
        ProxsparseError: bad input; nothing that looks finished is left behind.
        Interrupted: stopped on request, resumable.
    """
    if isinstance(calibration, str | os.PathLike):
        settings["calibration"] = os.fspath(calibration)
        calibration = None
    recipe = _recipe(method, preset, config, settings)
    if not recipe.method.can_share:
        require_one_process(f"method {recipe.method.name}")
    check_model(model)
    check_output(output, resume=resume)
    device = distributed.own_device(resolve_device(recipe.run.device))
    several = distributed.world_size() > 1
    with distributed.joined(device), output_directory(output, resume=resume) as partial:
        began = time.perf_counter()
        skeleton = build_model(model, torch.device("meta"))
        skeleton_targets = find_targets(skeleton, recipe.targets)
        recipe = recipe.for_model(skeleton, distributed.world_size())
        recipe = settle_memory(recipe, skeleton, skeleton_targets, device)
        check_output_fits(partial, skeleton, skeleton_targets)
        # Of several processes each reads the whole model and keeps its rows of it on the device.
        home = torch.device("cpu") if several else device
        base = _load_base(model, recipe, home)
        targets = find_targets(base.model, recipe.targets)
        check_finite(targets)
        fingerprint = model_fingerprint(targets)  # of the weights before they are rounded
        entry = settle_fp8_(recipe, base, targets)
        check_causal(base.model)
        if not base.is_made:  # what cannot be written is said before the work
            FileTargets(base.model, targets, open_checkpoint(base.id, base.revision))
        source = recipe.calibration.calibration if calibration is None else calibration
        data = load_data(source, base.tokenizer, recipe, base.model)
        identity = recipe.key(fingerprint, data.fingerprint if data else "")
        claim(partial, identity)
        checkpoints = Checkpoints(partial / "checkpoints", identity)
        metrics = partial / "metrics.jsonl" if distributed.is_main() else None
        why_not = why_not_measured(data, distributed.world_size(), base.is_made)
        measured = None
        if quality and not why_not:
            assert data is not None
            measured = Quality(base.model, data, recipe.run.dtype)
        if several:
            shard(base.model, targets, recipe, device)
        masks, history = run_method(base.model, targets, data, recipe, checkpoints, metrics, resume)
        if not distributed.is_main():
            return PruneResult(masks, {}, history)
        if several:
            base = _load_base(model, recipe, home)
            targets = find_targets(base.model, recipe.targets)
            settle_fp8_(recipe, base, targets)
        masks.metadata.update(mask_metadata(recipe, fingerprint, base.id, base.revision))
        report = pruned_report(
            recipe.as_dict(),
            base,
            fingerprint,
            targets,
            masks,
            data=data_report(data),
            weights_updated=recipe.method.updates_weights(recipe.options),
            seconds=round(time.perf_counter() - began, 2),
        )
        apply_masks_(base.model, masks)
        report["quality"] = measured.compare() if measured else None
        if quality and why_not:
            report["quality_not_measured"] = why_not
        dense_loss = _dense_loss(recipe, measured)
        write_result(partial, base, masks, report, history, dense_loss, entry)
    return PruneResult(masks, report, history)


def _recipe(
    method: str | None, preset: str | None, config: MethodConfig | None, settings: dict[str, Any]
) -> Recipe:
    """The recipe of settings that come typed, by name, or both."""
    if config is None:
        return make_recipe(method, preset, **settings)
    if not isinstance(config, MethodConfig):
        raise ProxsparseError(
            f"config is {config!r} ({type(config).__name__}): give the settings of a method, such "
            "as proxsparse.GatesConfig(steps=200)"
        )
    if method not in (None, config.method):
        raise ProxsparseError(
            f"config is of method {config.method!r}, not {method!r}: leave one of them out"
        )
    return make_recipe(config.method, preset, **{**config.given(), **settings})


def _dense_loss(recipe: Recipe, measured: Quality | None) -> float | None:
    """What the dense model's loss is, in the loss that the method minimises, where it is known."""
    if recipe.method.distils(recipe.options):
        return 0.0  # nothing diverges from itself
    return None if measured is None else math.log(measured.dense)


def apply(
    model: str | os.PathLike[str],
    mask: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    device: str = "cpu",
) -> PruneResult:
    """Put a mask file on its base model and write the pruned checkpoint.

    Bit-identical to what `prune` wrote, unless that method updated the weights it kept.

    Args:
        model: the base model, local directory or Hub name.
        mask: a `proxsparse.masks`, or a directory with one.
        output: directory to create; must not exist, or be empty.
        force: apply it to a model with other weights as well, as long as the shapes fit.
        device: where to compute.

    Raises:
        ProxsparseError: the mask file is unsound, or the model is not the one it was made for.
    """
    masks = Masks.load(mask)
    with output_directory(output) as partial:
        base = load_model(model, resolve_device(device))
        targets = targets_of(base.model, masks)
        fingerprint = model_fingerprint(targets)
        expected = masks.metadata.get("base_fingerprint")
        if fingerprint != expected and not force:
            raise ProxsparseError(
                f"{mask} was made for {masks.metadata.get('base_id')} with weights {expected}, but "
                f"{model} has {fingerprint}: use that model, or --force to insist"
            )
        report = pruned_report(
            json.loads(masks.metadata.get("recipe", "{}")),
            base,
            fingerprint,
            targets,
            masks,
            weights_updated=False,
            mask_from_updated_weights=masks.metadata.get("weights_updated") == "true",
        )
        check_output_fits(partial, base.model, targets)
        apply_masks_(base.model, masks)
        write_result(partial, base, masks, report, [], fp8_entry=entry_of(base, targets))
    return PruneResult(masks, report, [])


def shard(model: nn.Module, targets: Targets, recipe: Recipe, device: torch.device) -> None:
    """Split a model over the processes of the job, in the dtype to learn in.

    The model then serves for learning only: its weights do not get their own dtype back.
    """
    dtype = resolve_dtype(recipe.run.dtype, model, recipe.learn.memory)
    if dtype is not None:
        model.to(dtype)
    distributed.shard_(model, targets, device)


def _load_base(model: str | os.PathLike[str], recipe: Recipe, device: torch.device) -> LoadedModel:
    if not recipe.run.random_init:
        return load_model(model, device)
    torch.manual_seed(recipe.calibration.seed)
    return LoadedModel(build_model(model, device), None, os.fspath(model), None, is_made=True)


def settle_memory(
    recipe: Recipe, model: nn.Module, targets: Targets, device: torch.device
) -> Recipe:
    """The recipe with a mode of memory that fits in place of auto; says what it will take.

    Args:
        recipe: the settings, `Recipe.for_model`; those of a method that does not learn come back
            as they are.
        model: the model, here or on the meta device.
        targets: what is pruned.
        device: where it will run.

    Raises:
        ProxsparseError: nothing fits, or not what was asked for.
    """
    if not recipe.method.learned:
        return recipe
    world = distributed.world_size()
    assert recipe.learn.batch_size is not None and recipe.calibration.max_seq_length is not None
    num_tokens = -(-recipe.learn.batch_size // world) * recipe.calibration.max_seq_length
    modes = dict(recipe.method.memory)
    if world > 1:
        # The scales of 8-bit states span rows. What is gathered cannot be made on demand: each
        # process keeps its rows of the original weights as well.
        modes.pop("low", None)
        modes["balanced"] += targets.layers[0].parameter.element_size()
    mode = choose_memory(model, targets, recipe.learn.memory, modes, num_tokens, device, world)
    return dataclasses.replace(recipe, learn=replace(recipe.learn, {"memory": mode}))


def load_data(source: Any, tokenizer: Any, recipe: Recipe, model: nn.Module) -> Calibration | None:
    """The calibration blocks that `recipe` asks for; None for a method that needs no data."""
    if not recipe.method.needs_data:
        return None
    if recipe.run.random_init:
        length = recipe.calibration.max_seq_length
        assert length is not None
        shape = (recipe.num_samples, length)
        random = torch.Generator().manual_seed(recipe.calibration.seed)
        tokens = torch.randint(text_config(model).vocab_size, shape, generator=random)
        return Calibration(tokens, "random tokens", tokens.numel(), tokens.numel(), "random")
    return load_calibration(source, tokenizer, recipe.calibration, recipe.num_samples, model)


def data_report(data: Calibration | None) -> dict[str, Any] | None:
    """What `proxsparse.json` says of the text; None where there was none."""
    if data is None:
        return None
    return {
        "source": data.source,
        "tokens": data.num_tokens,
        "available_tokens": data.num_available_tokens,
        "samples": data.tokens.shape[0],
        "fingerprint": data.fingerprint,
        "prefix": list(data.prefix),
    }


def run_method(
    model: nn.Module,
    targets: Targets,
    data: Calibration | None,
    recipe: Recipe,
    checkpoints: Checkpoints | None = None,
    metrics: Path | None = None,
    resume: bool = False,
    run: Callable[[Job], Masks] | None = None,
) -> tuple[Masks, list[dict[str, float]]]:
    """Run a recipe's method on a model in memory, or `run` in its place.

    Returns:
        The masks (not yet applied), and the history of a learned method. The model's weights are
        the original ones, unless the method updates the weights it keeps.
    """
    torch.manual_seed(recipe.calibration.seed)
    device = next(model.parameters()).device
    recipe = recipe.for_model(model, distributed.world_size())
    if recipe.learn.memory == "auto":
        recipe = settle_memory(recipe, model, targets, device)
    memory = recipe.learn.memory if recipe.method.learned else ""
    dtype = resolve_dtype(recipe.run.dtype, model, memory)
    job = Job(
        model=model,
        targets=targets,
        tokens=data.tokens if data else torch.empty(0, 0, dtype=torch.int64),
        learn=recipe.learn,
        options=recipe.options,
        checkpoints=checkpoints,
        metrics=metrics,
        resume=resume,
    )
    try:
        with (
            computing_in(model, None if distributed.world_size() > 1 else dtype),
            tracking(recipe, metrics) as job.track,
        ):
            masks = (run or recipe.method.run)(job)
    except torch.OutOfMemoryError as error:
        modes = list(recipe.method.memory)
        less = modes[modes.index(memory) + 1 :] if memory else []
        way_out = f"--memory {less[0]}, " if less else ""
        raise ProxsparseError(
            f"{device} ran out of memory ({str(error).splitlines()[0]}): try {way_out}a smaller "
            "--batch-size or a smaller --max-seq-length"
        ) from error
    return masks, job.history


@contextlib.contextmanager
def tracking(
    recipe: Recipe, metrics: Path | None
) -> Iterator[Callable[[dict[str, float]], None] | None]:
    """A function that hands a record of metrics to the tracker of the recipe, if it names one.

    Raises:
        ProxsparseError: accelerate does not know the tracker, or it is not installed.
    """
    if recipe.run.tracker is None:
        yield None
        return
    from accelerate import Accelerator

    directory = str(metrics.parent) if metrics else "."
    try:
        accelerator = Accelerator(cpu=True, log_with=recipe.run.tracker, project_dir=directory)
        accelerator.init_trackers("proxsparse", config=_flat(recipe.as_dict()))
        if not accelerator.trackers:
            raise ImportError("it is not installed")
    except (ValueError, ImportError) as error:
        raise ProxsparseError(
            f"--tracker {recipe.run.tracker} cannot be used ({error}): install it, or leave "
            "--tracker out; metrics.jsonl is written anyway"
        ) from error
    try:
        yield lambda record: accelerator.log(record, step=int(record["step"]))
    finally:
        accelerator.end_training()


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
