"""What `prune` would do, from the model's config alone: nothing is read, learned or written."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import nn

from proxsparse.jobs.prune import settle_memory
from proxsparse.jobs.recipe import Recipe, make_recipe
from proxsparse.learning import distributed
from proxsparse.models.loading import build_model, resolve_device
from proxsparse.models.targets import Targets, find_targets

_MATMUL_TOKENS = 2048
_TRIALS = 5


def plan_prune(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    method: str | None = None,
    preset: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Settings, targets, memory and a lower bound of the time of a pruning job.

    Args:
        model: local directory, config.json or Hub name; no weight is read.
        output: where the result would go.
        method: as for `prune`.
        preset: as for `prune`.
        **settings: as for `prune`.

    Returns:
        {"output", "recipe": every setting decided, "device", "layers": [{name, shape}],
        "left_dense": {name: reason}, "weights", "pruned_weights", "samples", "tokens": of the
        calibration, with repetitions, "output_bytes", "seconds": what the matrix products take at
        the speed measured now (None for a method without any), "seconds_from": how that was found}.

    Raises:
        ProxsparseError: settings that do not fit, or a device without the memory.
    """
    recipe = make_recipe(method, preset, **settings)
    device = resolve_device(recipe.run.device)
    skeleton = build_model(model, torch.device("meta"))
    targets = find_targets(skeleton, recipe.targets)
    recipe = recipe.for_model(skeleton, distributed.world_size())
    recipe = settle_memory(recipe, skeleton, targets, device)
    length = recipe.calibration.max_seq_length or 0
    parameters = {id(p): p for p in skeleton.parameters()}.values()
    pruned = sum(t.parameter.numel() for t in targets.layers)
    operations = _operations(recipe, skeleton, targets)
    speed = _operations_per_second(device, targets) if operations else None
    samples = recipe.num_samples if recipe.method.needs_data else 0
    tokens = samples * length
    if recipe.method.learned:
        assert recipe.learn.batch_size is not None
        tokens = recipe.learn.steps * recipe.learn.batch_size * length
    return {
        "output": os.fspath(output),
        "recipe": recipe.as_dict(),
        "device": str(device),
        "layers": [{"name": t.name, "shape": list(t.shape)} for t in targets.layers],
        "left_dense": dict(targets.left_dense),
        "weights": sum(p.numel() for p in parameters),
        "pruned_weights": pruned,
        "samples": samples,
        "tokens": tokens,
        "output_bytes": sum(p.numel() * p.element_size() for p in parameters) + pruned // 8,
        "seconds": operations / speed if speed else None,
        "seconds_from": f"matrix products alone, at the {speed / 1e12:.3g} TFLOP/s measured here; "
        "a run takes longer"
        if speed
        else "",
    }


def _operations(recipe: Recipe, model: nn.Module, targets: Targets) -> float:
    """Operations of the products of a job: two for each weight and token that meet."""
    if not recipe.method.needs_data:
        return 0.0
    length = recipe.calibration.max_seq_length or 0
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weights = sum(t.parameter.numel() for t in targets.layers)
    weights += 0 if head is None else head.weight.numel()
    if not recipe.method.learned:
        return 2.0 * weights * 2 * recipe.num_samples * length  # every block runs twice
    assert recipe.learn.batch_size is not None
    passes = 3 + recipe.method.distils(recipe.options)  # a backward pass counts as two
    passes += recipe.learn.memory in ("balanced", "low")  # activations are made again
    return 2.0 * weights * passes * recipe.learn.steps * recipe.learn.batch_size * length


@torch.no_grad()
def _operations_per_second(device: torch.device, targets: Targets) -> float:
    """Of the largest layer's product, in the dtype that learning computes in."""
    n, k = max((t.shape[-2:] for t in targets.layers), key=lambda s: s[0] * s[1])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    w = torch.randn(n, k, device=device, dtype=dtype)
    x = torch.randn(_MATMUL_TOKENS, k, device=device, dtype=dtype)
    seconds = []
    for _ in range(_TRIALS):
        began = time.perf_counter()
        nn.functional.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2.0 * _MATMUL_TOKENS * n * k / min(seconds)
