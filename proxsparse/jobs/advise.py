"""Which layers of a model would gain from 2:4, before anything is pruned or converted.

A layer's shape and the number of tokens decide, so the model's config is enough. On a GPU the
layers are tuned, then measured with random weights. Elsewhere only limits can be given: a call
takes at least the time to move its bytes and the time to do its operations, and sparsity shortens
each by a known factor. Which of the two binds depends on the GPU and the number of tokens.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from proxsparse import ops
from proxsparse.config import TargetConfig
from proxsparse.errors import ProxsparseError
from proxsparse.inference.sparse_linear import SparseLinear
from proxsparse.inference.sparsify import why_not_sparse
from proxsparse.models.loading import build_model, resolve_device
from proxsparse.models.targets import find_targets
from proxsparse.tuning import tune

OPERATION_LIMIT = 2.0  # sparse tensor cores skip one of every two products
# Other forms of the same layers: bytes per weight, and operations a second over dense 16 bits. FP8
# tensor cores do twice as many; INT4 weights (one 16-bit scale for 128) are widened to 16 bits.
ALTERNATIVES = {
    "2:4 in 16 bits": (1.125, 2.0),
    "FP8, dense": (1.0, 2.0),
    "FP8 and 2:4": (0.625, 4.0),
    "INT4, dense": (0.5 + 2 / 128, 1.0),
}
_TUNING_SECONDS = 300.0

# Shape, or None for the lm_head -> tokens -> microseconds dense and sparse.
_Times = dict[tuple[int, int] | None, dict[int, tuple[float, float]]]


def advise(
    model: str | os.PathLike[str],
    *,
    tokens: Sequence[int] = (1, 16, 256, 4096),
    targets: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
    device: str = "auto",
) -> dict[str, Any]:
    """What making a model's layers sparse could gain, from its config alone.

    Args:
        model: directory or name on the Hub, pruned, packed or dense; no weight is read.
        tokens: numbers of tokens in one call: the batch size while decoding, all tokens of
            the prompts in prefill.
        targets: patterns of layers, see `find_targets`.
        ignore: patterns of layers that stay dense.
        device: "auto" or a torch device; only a CUDA device is measured.

    Returns:
        {"device", "measured": whether speed-ups were, "dtype", "tokens",
        "shapes": one row per shape, {shape, layers: how many, dense_bytes and packed_bytes of one,
        byte_limit: {tokens: x}, operation_limit: x, speedup: {tokens: x} or None, predicted: the
        same as it would be expected unmeasured, empty on a GPU that nothing is known of, or None},
        "model": the same for all layers and what stays dense, {dense_bytes, packed_bytes,
        byte_limit: x for weights alone, operation_limit: x, speedup},
        "alternatives": other forms of the same layers, name -> {bytes, byte_limit, operation_limit}
        of the whole model; computed, never measured,
        "tuning": what the tuner did, the fields of `tuning.tune.Report`, or None where nothing was
        measured, "left_dense": {name: reason}}. Experts count as if all of them were read;
        attention and its cache are left out.

    Raises:
        ProxsparseError: not a causal LM, bad patterns, or no layer could be sparse.
    """
    if not tokens or min(tokens) < 1:
        raise ProxsparseError(f"--tokens is {list(tokens)}: give numbers of at least 1")
    where = resolve_device(device)
    skeleton = build_model(model, torch.device("meta"))
    found = find_targets(skeleton, TargetConfig(targets=targets, ignore=ignore))
    reasons = {target.name: why_not_sparse(target) for target in found.layers}
    left_dense = {**found.left_dense, **{name: r for name, r in reasons.items() if r}}
    layers = [target for target in found.layers if not reasons[target.name]]
    if not layers:
        first = found.layers[0].name
        raise ProxsparseError(f"no layer of {model} can be sparse: {first} is {reasons[first]}")

    dtype = layers[0].parameter.dtype
    counts: dict[tuple[int, int], int] = {}
    for target in layers:
        n, k = target.shape
        counts[n, k] = counts.get((n, k), 0) + 1
    measured = where.type == "cuda"
    times: _Times = {}
    report = None
    if measured:
        report = _tune(list(counts), tokens, dtype, where)
        times |= {shape: measure(*shape, tokens, dtype, where) for shape in counts}

    size = dtype.itemsize
    rows = []
    for (n, k), count in counts.items():
        dense, packed = n * k * size, _packed_bytes(n, k, size)
        traffic = {m: m * (n + k) * size for m in tokens}  # x is read, y is written
        row: dict[str, Any] = {
            "shape": [n, k],
            "layers": count,
            "dense_bytes": dense,
            "packed_bytes": packed,
            "byte_limit": {m: (dense + t) / (packed + t) for m, t in traffic.items()},
            "operation_limit": OPERATION_LIMIT,
            "speedup": {m: a / b for m, (a, b) in times[n, k].items()} if measured else None,
            "predicted": _predict(n, k, tokens, dtype, where) if measured else None,
        }
        rows.append(row)
    rest = _parameters_left(skeleton, [target.parameter for target in layers])
    dense_bytes = sum(row["dense_bytes"] * row["layers"] for row in rows)
    packed_bytes = sum(row["packed_bytes"] * row["layers"] for row in rows)
    speedup = None
    if measured:
        head = skeleton.get_output_embeddings()
        if all(target.module is not head for target in layers):
            n, k = head.weight.shape
            times[None] = measure(n, k, tokens, dtype, where)
        speedup = {m: _speedup_of_all(counts, times, m) for m in tokens}
    return {
        "device": torch.cuda.get_device_name(where) if measured else str(where),
        "measured": measured,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": list(tokens),
        "shapes": rows,
        "model": {
            "dense_bytes": rest + dense_bytes,
            "packed_bytes": rest + packed_bytes,
            "byte_limit": (rest + dense_bytes) / (rest + packed_bytes),
            "operation_limit": (rest + dense_bytes) / (rest + dense_bytes / OPERATION_LIMIT),
            "speedup": speedup,
        },
        "alternatives": _alternatives(sum(n * k * c for (n, k), c in counts.items()), rest, size),
        "tuning": None if report is None else dataclasses.asdict(report),
        "left_dense": left_dense,
    }


def _tune(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> tune.Report | None:
    """Lets the sparse layers find what to run on first, as far as `_TUNING_SECONDS` reach.

    What was found before, and what is found now, is kept for the layers of this machine.
    """
    layers = [(n, k, False) for n, k in shapes if not ops.can_compress(n, k, dtype)]
    if not layers:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return tune.tune_layers(layers, tokens, dtype=dtype, device=index, seconds=_TUNING_SECONDS)


def _predict(
    n: int, k: int, tokens: Sequence[int], dtype: torch.dtype, device: torch.device
) -> dict[int, float]:
    """Token count -> predicted speed-up over dense of a layer that holds its dense weight too."""
    if ops.can_compress(n, k, dtype):
        return {}
    index = torch.cuda.current_device() if device.index is None else device.index
    forms = ("dense", "decode", "prefill", "cusparselt", "unpack")
    return ops.predicted_speedups(index, n, k, dtype, False, tokens, forms)


def measure(
    n: int, k: int, tokens: Sequence[int], dtype: torch.dtype, device: torch.device
) -> dict[int, tuple[float, float]]:
    """Time one layer, dense and sparse, on random weights and inputs.

    Args:
        n: out_features.
        k: in_features.
        tokens: numbers of tokens.
        dtype: of weight and input.
        device: where.

    Returns:
        tokens -> (microseconds dense, microseconds sparse), medians of eager calls.
    """
    linear = nn.Linear(k, n, bias=False, device=device, dtype=dtype)
    linear.weight.data = ops.project_2to4(linear.weight.data)
    sparse = SparseLinear.from_linear(linear, keep_dense=True)
    result = {}
    for m in tokens:
        x = torch.randn(m, k, device=device, dtype=dtype)
        result[m] = (_microseconds(linear, x), _microseconds(sparse, x))
    return result


@torch.no_grad()
def _microseconds(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """The median time of a call, of 10 after 3 to warm up."""
    times = []
    for _ in range(13):
        began = time.perf_counter()
        layer(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        times.append(time.perf_counter() - began)
    return sorted(times[3:])[5] * 1e6


def _speedup_of_all(counts: dict[tuple[int, int], int], times: _Times, tokens: int) -> float:
    """Of all sparse layers and the dense lm_head together."""
    head = times[None][tokens][0] if None in times else 0.0
    dense = sum(times[shape][tokens][0] * count for shape, count in counts.items())
    sparse = sum(times[shape][tokens][1] * count for shape, count in counts.items())
    return (dense + head) / (sparse + head)


def _alternatives(num_weights: int, rest: int, size: int) -> dict[str, dict[str, float]]:
    """What other forms of the layers would take and could gain; the rest stays as it is."""
    dense = rest + num_weights * size
    forms = {}
    for name, (per_weight, operations) in ALTERNATIVES.items():
        taken = rest + round(num_weights * per_weight)
        forms[name] = {
            "bytes": taken,
            "byte_limit": dense / taken,
            "operation_limit": dense / (rest + num_weights * size / operations),
        }
    return forms


def _packed_bytes(n: int, k: int, size: int) -> int:
    return n * k // 2 * size + n * ((k + 7) // 8)


def _parameters_left(model: nn.Module, taken: list[nn.Parameter]) -> int:
    """Bytes of the parameters a forward pass reads besides `taken`.

    That leaves out an embedding which is only looked up, not tied to the lm_head.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    looked_up = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, nn.Embedding) and (head is None or m.weight is not head.weight)
    }
    skipped = looked_up | {id(p) for p in taken}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in skipped)
