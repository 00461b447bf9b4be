"""The CUDA backend: the ops of `proxsparse._cuda` on tensors.

The extension is built without libtorch and knows only addresses, sizes and streams. What a call of
`sparse_linear` runs on is decided by `choice`, once per shape, range of token counts and set of
weight forms; afterwards a call costs one look-up before its launch.

Importing this module raises ImportError, with the reason, when the extension was not built.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from proxsparse.backends import choice, cusparselt, prediction, table
from proxsparse.backends.cusparselt import extension as _cuda
from proxsparse.backends.executors import RUNS, Decode, Kernel, Run, executor, is_right
from proxsparse.backends.fp8 import sparse_linear_fp8_cuda
from proxsparse.backends.limits import (
    CODES,
    can_compress,
    can_decode,
    can_prefill,
)
from proxsparse.backends.stream_memory import current_stream
from proxsparse.backends.weight_forms import aligned, compress_2to4_cuda, is_aligned
from proxsparse.errors import ProxsparseError
from proxsparse.ops.reference import MAX_DECODE_TOKENS

# `ops` finds the op STEM here as STEM_cuda.
__all__ = [
    "compress_2to4_cuda",
    "sparse_linear_cuda",
    "sparse_linear_fp8_cuda",
    "sparse_linear_group_cuda",
]

_log = logging.getLogger(__name__)

# `choice.range_of` where it counts tiles: a look-up takes less time than asking.
_RANGES = tuple(map(choice.range_of, range(2049)))


def sparse_linear_cuda(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    compressed: Tensor | None,
    dense: Tensor | None,
) -> Tensor:
    """See `reference.sparse_linear`; runs on what `choice.choose` picks from the forms given.

    Args:
        x: [..., K], bfloat16 or float16; other dtypes run dense.
        values: [N, K/2] of x's dtype.
        codes: uint8 [N, ceil(K/8)], or in tiles, which the kernel for few tokens reads as they are.
        bias: [N] of x's dtype, or None.
        compressed: from `compress_2to4_cuda`, or None; needed to run on cuSPARSELt.
        dense: [N, K], or None; needed to run dense without unpacking first.

    Returns:
        [..., N] of x's dtype. A token count that is not a multiple of 8 is padded for cuSPARSELt:
        x is copied into a longer tensor and the result is the front part of one.

    Deterministic for a given choice of executor. Can be captured in a CUDA graph.

    Raises:
        ProxsparseError: dtypes or devices do not agree.
        RuntimeError: the library failed; its text, the call and the shapes are named.
    """
    n, half = values.shape
    if not x.numel() or not n:
        return torch.nn.functional.linear(x, x.new_zeros(n, 2 * half), bias)
    run = find_run(x, values, codes, bias, compressed, dense)
    device = x.get_device()
    if torch.cuda.current_device() == device:
        return run(x, values, codes, bias, compressed, dense)
    with torch.cuda.device(device):
        return run(x, values, codes, bias, compressed, dense)


def sparse_linear_group_cuda(x: Tensor, *forms: Sequence[Any]) -> list[Tensor]:
    """See `reference.sparse_linear_group`; what is left to the kernel for few tokens is one launch.

    Args:
        x: [..., K], as in `sparse_linear_cuda`.
        *forms: of each weight values, codes, bias, compressed and dense.

    Raises:
        ProxsparseError: dtypes or devices do not agree.
        RuntimeError: a launch failed; its text and the shapes are named.
    """
    weights = list(zip(*forms, strict=True))
    most = _cuda.MAX_DECODE_WEIGHTS if _cuda.has_kernels else 1
    results: list[Tensor] = []
    with torch.cuda.device(x.device):
        for first in range(0, len(weights), most):
            together = weights[first : first + most]
            if _share_a_launch(x, together):
                results += _decode_together(x, [weight[:3] for weight in together])
            else:
                results += [sparse_linear_cuda(x, *weight) for weight in together]
    return results


def _share_a_launch(x: Tensor, weights: Sequence[tuple[Any, ...]]) -> bool:
    """Whether each product would run on our kernel for few tokens, on the weight as it lies."""
    is_plain = x.numel() > 0 and all(
        values.numel() and codes.dim() == 3 and is_aligned(values) and is_aligned(codes)
        for values, codes, *_ in weights
    )
    return is_plain and all(isinstance(find_run(x, *forms), Decode) for forms in weights)


def _decode_together(
    x: Tensor, weights: Sequence[tuple[Tensor, Tensor, Tensor | None]]
) -> list[Tensor]:
    """The products with values, codes and bias of each weight, in the layout the kernel chooses."""
    x, k = aligned(x), x.shape[-1]
    results = [x.new_empty(*x.shape[:-1], values.shape[0]) for values, *_ in weights]
    operands = [
        (y.shape[-1], *(0 if t is None else t.data_ptr() for t in (*weight, y)))
        for weight, y in zip(weights, results, strict=True)
    ]
    _cuda.sparse_linear_group(
        CODES[x.dtype],
        x.numel() // k,
        k,
        x.data_ptr(),
        operands,
        True,
        current_stream(x.get_device()),
    )
    return results


def find_run(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    compressed: Tensor | None,
    dense: Tensor | None,
) -> Run:
    """What runs for operands like these; called with x's device current, it may serve them.

    Raises:
        ProxsparseError: dtypes or devices do not agree.
    """
    n, half = values.shape
    tokens = x.numel() // (2 * half)
    # What must agree but differs is a key of its own, and refused when it is first seen.
    key = (
        *(x.get_device(), x.dtype, values.dtype, n, half),
        _RANGES[tokens] if tokens < len(_RANGES) else choice.range_of(tokens),
        None if bias is None else bias.dtype,
        None if compressed is None else compressed.get_device(),
        None if dense is None else dense.dtype,
    )
    run: Run | None = table.decisions.get(key)
    if run is None:
        run = table.decisions[key] = _decide(x, values, bias, compressed, dense, tokens)
    return run


def find_run_for_shape(x: Tensor, *forms: Any) -> Run:
    """`find_run`, for x of exactly this shape: it has less to do at a call."""
    run = find_run(x, *forms)
    return run.for_shape(x.shape) if isinstance(run, Kernel) else run


def decide_every_count(
    values: Tensor, codes: Tensor, bias: Tensor | None, compressed: Tensor | None
) -> None:
    """See `ops.decide_sparse_linear`."""
    row = values.new_empty(1, 2 * values.shape[1])
    with torch.cuda.device(values.device):
        for tokens in choice.RANGE_STARTS:
            find_run(row.expand(tokens, -1), values, codes, bias, compressed, None)


def _decide(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    compressed: Tensor | None,
    dense: Tensor | None,
    tokens: int,
) -> Run:
    """Picks an executor for calls like this one."""
    device = x.get_device()
    for name, other in (("values", values), ("bias", bias), ("dense", dense)):
        if other is not None and (other.dtype != x.dtype or other.get_device() != device):
            raise ProxsparseError(
                f"x is {x.dtype} on {x.device}, but {name} is {other.dtype} on {other.device}: "
                "they must agree"
            )
    n, k = values.shape[0], 2 * values.shape[1]
    available = {name for name in RUNS if name != "dense" or dense is not None}
    record = constants = None
    bucket = choice.find_bucket(tokens)
    name = str(x.dtype).removeprefix("torch.")
    cell = choice.Cell(n, k, bucket, name, bias is not None)
    if not can_decode(k, bucket, x.dtype, device) and is_right("decode", device):
        available.add("decode")
    if not can_prefill(n, k, bucket, x.dtype, device) and is_right("prefill", device):
        available.add("prefill")
    if compressed is not None:
        reason = can_compress(n, k, x.dtype)
        if compressed.get_device() != device:
            reason = f"the compressed weight is on {compressed.device}, x on {x.device}"
        if reason:
            raise ProxsparseError(f"a compressed weight was given, but cannot be used: {reason}")
        available.add("cusparselt")
    if x.dtype in CODES and not isinstance(cusparselt.find_library(), str):
        _warn_of_version(device)
        known = table.table_for(device)
        record, constants = known.get(cell), known.constants
    elif x.dtype in CODES:
        constants = _constants(device)
    is_predicted = constants is not None and _cuda.has_kernels
    is_unseen = record is None and dense is not None and not is_predicted
    if is_unseen and bucket > _decode_beats_dense_up_to(device):
        available.discard("decode")
    chosen = choice.choose(record, tokens, available, cell, constants)
    _log.info("%s runs on %s (%s)", cell, *chosen)
    return executor(chosen.candidate, device, x.dtype, n, k, bias)


@functools.cache
def _constants(device: int) -> prediction.Constants | None:
    """Those of the GPU's model where cuSPARSELt, and with it the table, is absent."""
    return table.shipped_constants(torch.cuda.get_device_name(device))


@functools.cache
def _decode_beats_dense_up_to(device: int) -> int:
    """The tokens up to which the kernel for few of them is preferred unseen to a dense weight.

    On an H200 it was faster for every layer of a 7 to 70 B model, the other one on an H100 up to
    16 tokens. Triton's stand-in seldom is, and runs only where it was seen to be.
    """
    if not _cuda.has_kernels:
        return 0
    return MAX_DECODE_TOKENS if torch.cuda.get_device_capability(device)[0] == 9 else 16


def _sparse_linear_decode(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.sparse_linear_decode`; x of 1 to 64 tokens, bfloat16 or float16.

    Raises:
        ProxsparseError: the kernel cannot take this shape or dtype.
        RuntimeError: the launch failed; its text and the shapes are named.
    """
    n, half = values.shape
    if not x.numel():
        return x.new_empty(*x.shape[:-1], n)
    reason = can_decode(2 * half, x.numel() // (2 * half), x.dtype, x.get_device())
    if reason:
        raise ProxsparseError(f"sparse_linear_decode cannot run: {reason}")
    with torch.cuda.device(x.device):
        return Decode((0, 0, 0), x.get_device(), x.dtype, n, 2 * half)(x, values, codes, bias)


if _cuda.has_kernels:  # without it the op runs on Triton
    sparse_linear_decode_cuda = _sparse_linear_decode


@functools.cache
def _warn_of_version(device: int) -> None:
    found = cusparselt.library()
    text = cusparselt.version_warning(found.version, torch.cuda.get_device_capability(device))
    if text:
        _log.warning("%s (%s)", text, found.path)
