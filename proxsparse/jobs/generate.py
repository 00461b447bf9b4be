"""A prompt continued by a model dense and sparse, side by side."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from proxsparse.config import FP8_DYNAMIC
from proxsparse.errors import ProxsparseError
from proxsparse.inference.decoding import decode_greedily
from proxsparse.inference.sparse_linear import sparse_layers
from proxsparse.inference.sparsify import densify_, sparsify_
from proxsparse.models.loading import (
    LoadedModel,
    build_model,
    load_model,
    resolve_device,
    state_bytes,
)
from proxsparse.models.positions import check_positions, num_positions
from proxsparse.ops import dispatch

_BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


def generate(
    model: str | os.PathLike[str],
    prompt: str,
    *,
    max_new_tokens: int = 32,
    compare: bool = True,
    keep_dense: bool = False,
    compile: bool = False,
    device: str = "auto",
) -> dict[str, Any]:
    """Continue a prompt greedily with a pruned model, dense and then sparse.

    Args:
        model: a checkpoint whose layers are 2:4, dense or packed; directory or Hub name.
        prompt: the text to continue.
        max_new_tokens: tokens to generate at most.
        compare: whether to run the dense model too; it needs its memory.
        keep_dense: whether the sparse layers hold the dense weights too, see `sparse_linear`.
        compile: whether both runs fuse their small kernels with `torch.compile`.
        device: "auto" or a torch device.

    Returns:
        {"device", "backend": what multiplies by sparse weights here, "sparse_layers": how many,
        "runs": {"dense" and "sparse": {num_tokens, seconds, prefill_seconds: from the prompt to
        the first token, tokens_per_second: of all, decode_tokens_per_second: of those after the
        first (None when there are none), decoding: how, see `Decoded`, weight_bytes, text}},
        "same_tokens": whether both runs agree (None without `compare`), "speedup": likewise, of
        tokens_per_second}. Seconds include prefill, not what warms up before it.

    Raises:
        ProxsparseError: no layer is 2:4, the prompt is empty, max_new_tokens below 1, or prompt and
            new tokens more than the model has positions.
    """
    where = resolve_device(device)
    if max_new_tokens < 1:
        raise ProxsparseError(f"--max-new-tokens is {max_new_tokens}: give at least 1")
    # Known from the config, before weights are read; the prompt has a token at least.
    skeleton = build_model(model, torch.device("meta"))
    _check_room(skeleton, 1, max_new_tokens)
    loaded = load_model(model, where)
    input_ids = loaded.tokenizer(prompt, return_tensors="pt").to(where)["input_ids"]
    if input_ids.shape[-1] == 0:
        raise ProxsparseError("the prompt is empty: give --prompt some text")
    _check_room(loaded.model, input_ids.shape[-1], max_new_tokens)
    runs: dict[str, dict[str, Any]] = {}
    packed = sparse_layers(loaded.model)
    scales = {name: x.weight_scale for name, x in packed.items() if x.weight_scale is not None}
    scales |= loaded.scales
    del packed
    if compare:
        densify_(loaded.model)
        runs["dense"] = _run(loaded, input_ids, max_new_tokens, compile)
    quantize = FP8_DYNAMIC if scales else None
    report = sparsify_(loaded.model, keep_dense=keep_dense, quantize=quantize, scales=scales)
    runs["sparse"] = _run(loaded, input_ids, max_new_tokens, compile)
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


def _check_room(model: Any, prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse a prompt and an answer that the model has no positions for."""
    what = f"a prompt of {prompt_tokens} tokens and --max-new-tokens {max_new_tokens} are "
    what += f"{prompt_tokens + max_new_tokens} tokens"
    room = (num_positions(model) or 0) - prompt_tokens
    way_out = f"give --max-new-tokens {room} at most" if room > 0 else "give a shorter prompt"
    check_positions(model, prompt_tokens + max_new_tokens, what, way_out)


def _run(
    loaded: LoadedModel, input_ids: Tensor, max_new_tokens: int, compile: bool
) -> dict[str, Any]:
    model = loaded.model
    decoded = decode_greedily(model, input_ids, max_new_tokens, compile=compile)
    tokens = decoded.tokens[0]
    seconds = decoded.prefill_seconds + decoded.decode_seconds
    steps = decoded.num_steps
    forms = [layer.memory_bytes() for layer in sparse_layers(model).values()]
    return {
        "tokens": tokens,
        "num_tokens": len(tokens),
        "seconds": seconds,
        "prefill_seconds": decoded.prefill_seconds,
        "tokens_per_second": len(tokens) / seconds,
        "decode_tokens_per_second": steps / decoded.decode_seconds if steps else None,
        "decoding": decoded.decoding,
        "weight_bytes": state_bytes(model) + sum(f["compressed"] + f["dense"] for f in forms),
        "text": loaded.tokenizer.decode(tokens, skip_special_tokens=True),
    }


def _backend(device: torch.device) -> str:
    """The backend of the sparse product on this device."""
    for backend in _BACKENDS.get(device.type, ()):
        if not isinstance(dispatch.implementation("sparse_linear", backend), str):
            return backend
    return "reference"
