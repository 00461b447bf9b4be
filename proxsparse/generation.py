"""The same prompt through a model with its layers dense and sparse, timed side by side."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from proxsparse import ops
from proxsparse.errors import ProxsparseError
from proxsparse.loading import LoadedModel, load_model, resolve_device
from proxsparse.patch import densify_, sparsify_, state_bytes
from proxsparse.sparse_linear import sparse_layers

_BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


def generate(
    model: str | os.PathLike[str],
    prompt: str,
    *,
    max_new_tokens: int = 32,
    compare: bool = True,
    memory: str = "min",
    device: str = "auto",
) -> dict[str, Any]:
    """Continue a prompt greedily with a pruned model, dense and then sparse.

    Args:
        model: a checkpoint whose layers are 2:4, dense or packed; directory or Hub name.
        prompt: the text to continue.
        max_new_tokens: tokens to generate at most.
        compare: whether to run the dense model too; it needs its memory.
        memory: of the sparse layers, "min" or "fast", see `sparse_linear`.
        device: "auto" or a torch device.

    Returns:
        {"device", "backend": what multiplies by sparse weights here, "sparse_layers": how many,
        "runs": {"dense" and "sparse": {num_tokens, seconds, tokens_per_second, weight_bytes,
        text}},
        "same_tokens": whether both runs agree (None without `compare`), "speedup": likewise}.
        Seconds include the reading of the prompt; one token is generated before, to warm up.

    Raises:
        ProxsparseError: no layer is 2:4, or the prompt is empty.
    """
    where = resolve_device(device)
    loaded = load_model(model, where)
    inputs = loaded.tokenizer(prompt, return_tensors="pt").to(where)
    if inputs["input_ids"].shape[-1] == 0:
        raise ProxsparseError("the prompt is empty: give --prompt some text")
    runs: dict[str, dict[str, Any]] = {}
    if compare:
        densify_(loaded.model)
        runs["dense"] = _run(loaded, inputs, max_new_tokens)
    report = sparsify_(loaded.model, memory=memory)
    runs["sparse"] = _run(loaded, inputs, max_new_tokens)
    tokens = [run.pop("tokens") for run in runs.values()]
    speeds = [run["tokens_per_second"] for run in runs.values()]
    return {
        "device": str(where),
        "backend": _backend(where),
        "sparse_layers": len(report.sparse),
        "runs": runs,
        "same_tokens": tokens[0] == tokens[1] if compare else None,
        "speedup": speeds[1] / speeds[0] if compare else None,
    }


def _run(loaded: LoadedModel, inputs: Any, max_new_tokens: int) -> dict[str, Any]:
    """Generate greedily, after one token to warm up."""
    model = loaded.model
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    _wait_for(model.device)
    began = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    _wait_for(model.device)
    seconds = time.perf_counter() - began
    tokens = output[0, inputs["input_ids"].shape[-1] :].tolist()
    forms = [layer.memory_bytes() for layer in sparse_layers(model).values()]
    return {
        "tokens": tokens,
        "num_tokens": len(tokens),
        "seconds": seconds,
        "tokens_per_second": len(tokens) / seconds,
        "weight_bytes": state_bytes(model) + sum(f["compressed"] + f["dense"] for f in forms),
        "text": loaded.tokenizer.decode(tokens, skip_special_tokens=True),
    }


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _backend(device: torch.device) -> str:
    """The backend of the sparse product on this device."""
    for backend in _BACKENDS.get(device.type, ()):
        if not isinstance(ops.implementation("sparse_linear", backend), str):
            return backend
    return "reference"
