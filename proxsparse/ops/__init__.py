"""The seam between what the package does and how it is computed: the checked functions people call.

Each op is registered with `torch.library` (so torch.compile and CUDA graphs see it) and runs on one
of four backends: `reference` (PyTorch, any device, the definition), `cpu` (C++ and OpenMP), `cuda`
(C++ and CUDA) or `triton` (CUDA). Which one is `dispatch`'s business.

Scalars that change every step (step, lr, lam, grad_scale) may be Python floats or 0-d tensors. A
0-d tensor on the GPU is read by the kernel itself: no host synchronisation, so a captured graph can
be replayed with new values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from proxsparse.errors import ProxsparseError
from proxsparse.ops import reference
from proxsparse.ops.dispatch import BACKENDS, forced_backend, implementation, use_backend
from proxsparse.ops.reference import FP8, MAX_DECODE_TOKENS
from proxsparse.ops.schemas import OPS

__all__ = [
    "BACKENDS",
    "FP8",
    "MAX_DECODE_TOKENS",
    "OPS",
    "can_compress",
    "code_rows",
    "compress_2to4",
    "eager_key",
    "gate_project_",
    "gate_update_",
    "implementation",
    "is_2to4",
    "known_speedups",
    "lay_out_2to4",
    "mask_2to4",
    "pack_2to4",
    "predicted_speedups",
    "project_2to4",
    "prox_2to4",
    "prox_adamw_",
    "quantize_fp8",
    "settled_sparse_linear",
    "sparse_linear",
    "sparse_linear_decode",
    "sparse_linear_fp8",
    "sparse_linear_group",
    "unpack_2to4",
    "use_backend",
]


_op = torch.ops.proxsparse


def _check_groups(name: str, x: Tensor, more: tuple[torch.dtype, ...] = ()) -> None:
    if x.dim() == 0 or x.shape[-1] % 4:
        raise ProxsparseError(
            f"{name} has shape {list(x.shape)}: the last dimension must be a multiple of 4, "
            "because a group is four neighbours along it"
        )
    if not x.is_floating_point() and x.dtype not in more:
        raise ProxsparseError(f"{name} has dtype {x.dtype}: a floating dtype is needed")


def _check_like(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.shape != like.shape or x.device != like.device:
        raise ProxsparseError(
            f"{name} is {list(x.shape)} on {x.device}, but {like_name} is {list(like.shape)} on "
            f"{like.device}: they must agree"
        )


def _check_in_place(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not x.is_contiguous():
            raise ProxsparseError(
                f"{name} is updated in place and must be contiguous; its strides are {x.stride()}"
            )


def _check_norm(act_norm: Tensor, s: Tensor) -> None:
    if list(act_norm.shape) != [*s.shape[:-2], s.shape[-1]] or s.dim() < 2:
        raise ProxsparseError(
            f"act_norm is {list(act_norm.shape)}; gates {list(s.shape)} need one norm per input "
            f"feature, {[*s.shape[:-2], s.shape[-1]]}"
        )


def _check_8_bit(s: Tensor, m: Tensor, v: Tensor, scales: Tensor) -> None:
    found, needed = (s.dtype, m.dtype, v.dtype), (torch.uint8, torch.int8, torch.uint8)
    if found != needed:
        raise ProxsparseError(f"with scales s, m, v must be of {needed}, not {found}")
    blocks = -(-s.shape[-2] * s.shape[-1] // reference.QUANTUM_BLOCK)
    expected = [*s.shape[:-2], blocks, 2]
    if list(scales.shape) != expected or scales.dtype != torch.float32:
        raise ProxsparseError(
            f"scales are {list(scales.shape)} of {scales.dtype}; 8-bit states {list(s.shape)} need "
            f"{expected} of torch.float32"
        )
    _check_in_place(scales=scales)


def _scalar(name: str, x: float | Tensor, minimum: float = 0.0) -> Tensor:
    if isinstance(x, Tensor):
        if x.dim():
            raise ProxsparseError(f"{name} must be a float or a 0-d tensor, not {list(x.shape)}")
        return x
    if not x >= minimum:
        raise ProxsparseError(f"{name} is {x}: it must be at least {minimum:g}")
    return torch.tensor(x, dtype=torch.float64)


def prox_2to4(z: Tensor, lam: float | Tensor) -> Tensor:
    """The exact proximal operator of R per group; see `reference.prox_2to4`."""
    _check_groups("z", z)
    return _op.prox_2to4(z.contiguous(), _scalar("lam", lam))  # type: ignore[no-any-return]


def project_2to4(w: Tensor, score: Tensor | None = None) -> Tensor:
    """The tensor w with all but two entries of each group +0.0; see `reference.project_2to4`."""
    _check_groups("w", w)
    if score is not None:
        _check_like("score", score, "w", w)
        score = score.contiguous()
    return _op.project_2to4(w.contiguous(), score)  # type: ignore[no-any-return]


def mask_2to4(score: Tensor) -> Tensor:
    """True at the two largest |score| of each group; see `reference.mask_2to4`."""
    _check_groups("score", score)
    return _op.mask_2to4(score.contiguous())  # type: ignore[no-any-return]


def is_2to4(w: Tensor) -> Tensor:
    """Whether every group has at most two non-zeros, as a 0-d bool tensor on w's device."""
    _check_groups("w", w)
    return _op.is_2to4(w.contiguous())  # type: ignore[no-any-return]


def pack_2to4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Kept values and group codes of a 2:4 tensor; see `reference.pack_2to4`.

    Raises:
        ProxsparseError: a group has three or four non-zeros; the first one is named. Or 8-bit
            values hold NaN. (Checking reads a flag back to the host; inside torch.compile it is
            skipped.)
    """
    _check_groups("w", w)
    w = w.contiguous()
    if w.dtype == FP8:
        check_fp8("w", w)
    _check_2to4(w)
    return _op.pack_2to4(w)  # type: ignore[no-any-return]


def check_fp8(name: str, values: Tensor) -> None:
    """Refuse 8-bit values that hold NaN, which no finite weight rounds to.

    Args:
        name: what an error calls the tensor.
        values: float8_e4m3fn, any shape. Reads a flag back to the host; inside torch.compile and
            on the meta device nothing is looked at.

    Raises:
        ProxsparseError: names how many values are NaN.
    """
    if torch.compiler.is_compiling() or values.is_meta:
        return
    count = int((values.view(torch.uint8) & 0x7F == 0x7F).sum())
    if count:
        raise ProxsparseError(
            f"{name} has {count} values with the code of NaN (0x7F or 0xFF): it was made from NaN "
            "or infinite weights, or its file is damaged; quantise sound weights again"
        )


def _check_2to4(w: Tensor) -> None:
    if torch.compiler.is_compiling() or is_2to4(w):
        return
    group = int((reference.widened(w).reshape(-1, 4) != 0).sum(-1).gt(2).nonzero()[0])
    row, column = divmod(4 * group, w.shape[-1])
    raise ProxsparseError(
        f"w is not 2:4: row {row}, columns {column} to {column + 3} hold "
        f"{w.reshape(-1, 4)[group].tolist()}; prune it first, e.g. with project_2to4"
    )


def unpack_2to4(values: Tensor, codes: Tensor) -> Tensor:
    """The dense tensor behind `pack_2to4`'s output; exact +0.0 where nothing was kept.

    The codes of a weight [N, K] may be in tiles, see `lay_out_2to4`.
    """
    k = 2 * values.shape[-1] if values.dim() else 0
    expected = [*values.shape[:-1], (k + 7) // 8]
    if codes.dim() == 3 and values.dim() == 2:
        if values.is_cuda:
            expected = list(_tiles_shape(values))
        else:  # no kernel of a CPU reads tiles
            codes = code_rows(values, codes)
    if k % 4 or list(codes.shape) != expected or codes.dtype != torch.uint8:
        raise ProxsparseError(
            f"values {list(values.shape)} need codes of shape {expected} and dtype uint8, not "
            f"{list(codes.shape)} and {codes.dtype}"
        )
    return _op.unpack_2to4(values.contiguous(), codes.contiguous())  # type: ignore[no-any-return]


def prox_adamw_(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    step: float | Tensor,
    lr: float | Tensor,
    lam: float | Tensor,
    grad_scale: float | Tensor = 1.0,
    w0: Tensor | None = None,
    lam2: float = 0.0,
    reg_eps: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """AdamW and the proximal step on weights, in place; see `reference.prox_adamw_`."""
    _check_groups("p", p)
    for name, x in (("grad", grad), ("m", m), ("v", v)):
        _check_like(name, x, "p", p)
    if w0 is not None:
        _check_like("w0", w0, "p", p)
        w0 = w0.contiguous()
    elif lam2 != 0:
        raise ProxsparseError(f"lam2 is {lam2}, so the original weight w0 is needed")
    _check_in_place(p=p, m=m, v=v)
    _op.prox_adamw_(
        p,
        grad.contiguous(),
        m,
        v,
        _scalar("step", step, 1.0),
        _scalar("lr", lr),
        _scalar("lam", lam),
        _scalar("grad_scale", grad_scale),
        w0,
        lam2,
        reg_eps,
        *betas,
        eps,
        weight_decay,
    )


def gate_update_(
    s: Tensor,
    grad: Tensor,
    w0: Tensor,
    m: Tensor,
    v: Tensor,
    act_norm: Tensor,
    *,
    step: float | Tensor,
    lr: float | Tensor,
    lam: float | Tensor,
    grad_scale: float | Tensor = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    out: Tensor | None = None,
    hard: bool = False,
    scales: Tensor | None = None,
    seed: int = 0,
) -> None:
    """Adam and the proximal step on gates, in place; see `reference.gate_update_`."""
    _check_groups("s", s, (torch.uint8,) if scales is not None else ())
    for name, x in (("grad", grad), ("w0", w0), ("m", m), ("v", v)):
        _check_like(name, x, "s", s)
    _check_norm(act_norm, s)
    _check_in_place(s=s, m=m, v=v)
    if scales is not None:
        _check_8_bit(s, m, v, scales)
    if out is not None:
        _check_like("out", out, "s", s)
        _check_in_place(out=out)
    _op.gate_update_(
        s,
        grad.contiguous(),
        w0.contiguous(),
        m,
        v,
        act_norm.contiguous(),
        _scalar("step", step, 1.0),
        _scalar("lr", lr),
        _scalar("lam", lam),
        _scalar("grad_scale", grad_scale),
        *betas,
        eps,
        out,
        hard,
        scales,
        seed,
    )


def gate_project_(s: Tensor, w0: Tensor, act_norm: Tensor, out: Tensor) -> None:
    """Write w0 under the mask of the gates into out; see `reference.gate_project_`."""
    _check_groups("s", s, (torch.uint8,))
    _check_like("w0", w0, "s", s)
    _check_like("out", out, "s", s)
    _check_norm(act_norm, s)
    _check_in_place(out=out)
    _op.gate_project_(s.contiguous(), w0.contiguous(), act_norm.contiguous(), out)


def sparse_linear(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    bias: Tensor | None = None,
    *,
    compressed: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """The product with a packed 2:4 weight, x @ W^T + bias; see `reference.sparse_linear`.

    `codes` may be in tiles, see `lay_out_2to4`. `compressed` and `dense` are other forms of the
    same weight, for backends that are faster with them; which a call uses is up to the backend.
    """
    _check_packed_product(x, values, codes, bias)
    return _op.sparse_linear(  # type: ignore[no-any-return]
        x, values, codes, bias, compressed, dense
    )


def eager_key(x: Tensor, bias: Tensor | None) -> tuple[Any, ...] | None:
    """What decides how `sparse_linear` runs on one weight, where nobody has to see the op.

    It holds the revision of the table of what was measured, so that a decision is forgotten when
    the table changes. None where the dispatcher is needed: for autograd, a compiler or a tensor
    subclass; where a backend was asked for, autocast is on or another GPU is current; and off CUDA.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or not x.is_cuda
        or forced_backend.get()
    ):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    device = x.get_device()
    if torch.is_autocast_enabled("cuda") or torch._C._cuda_getDevice() != device:
        return None
    table = _table or _load_table()
    return None if table is None else (x.shape, x.dtype, device, table.revision)


_table: Any = None  # the module of the tables; loaded by the first call on a GPU


def _load_table() -> Any:
    global _table
    if not isinstance(implementation("sparse_linear", "cuda"), str):
        from proxsparse.backends import table

        _table = table
    return _table


def settled_sparse_linear(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    compressed: Tensor | None,
    dense: Tensor | None,
) -> Callable[..., Tensor] | None:
    """What `sparse_linear` runs for these operands, to be called with them or with their like.

    "Their like" are operands of the same shapes, dtypes and devices, while `eager_key` of x and
    bias is the same. None where that is not decided once for all.
    """
    if isinstance(implementation("sparse_linear", "cuda"), str) or not x.numel():
        return None
    from proxsparse.backends.cuda import find_run_for_shape

    return find_run_for_shape(x, values, codes, bias, compressed, dense)


def decide_sparse_linear(
    values: Tensor, codes: Tensor, bias: Tensor | None = None, *, compressed: Tensor | None = None
) -> None:
    """Decide now what `sparse_linear` runs on with a weight like this one, for every token count.

    Without it the first call of each range of token counts decides. Where that call is being
    captured in a CUDA graph, kernels that nobody has tried yet are left out, for good. Off CUDA
    there is nothing to decide.

    Args:
        values: [N, K/2], of the dtype and on the device of the calls to come.
        codes: as in `sparse_linear`.
        bias: of the calls, or None.
        compressed: of the calls, or None.

    Cost: the first weight of a GPU has its kernels tried, which takes milliseconds and waits for
    them; others look up 50 decisions.
    """
    check_packed_2to4(values, codes)
    if values.is_cuda and not isinstance(implementation("sparse_linear", "cuda"), str):
        from proxsparse.backends import cuda

        cuda.decide_every_count(values, codes, bias, compressed)


def promise_serial_replay(device: int) -> None:
    """Say that CUDA graphs captured on one stream from now on never run at the same time.

    By itself each captured graph keeps some memory, of which there is a stock, for blocks of the
    kernel for many tokens to wait for each other; a graph that finds none runs that kernel in a
    slower way. With the promise all graphs that were captured on one stream share it, so that any
    number of them can be captured. Graphs that share a memory pool may not run at once anyhow.

    Args:
        device: index of a CUDA device.
    """
    if not isinstance(implementation("sparse_linear", "cuda"), str):
        from proxsparse.backends import stream_memory

        stream_memory.promise_serial_replay(device)


def sparse_linear_decode(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The product with a packed 2:4 weight for at most 64 tokens; `sparse_linear` picks it itself.

    For inference: no gradient is defined. See `reference.sparse_linear_decode`.
    """
    _check_packed_product(x, values, codes, bias)
    tokens = x.numel() // max(x.shape[-1], 1)
    if tokens > MAX_DECODE_TOKENS:
        raise ProxsparseError(
            f"x has {tokens} tokens: sparse_linear_decode takes at most {MAX_DECODE_TOKENS}; "
            "sparse_linear takes any number"
        )
    return _op.sparse_linear_decode(x, values, codes, bias)  # type: ignore[no-any-return]


def sparse_linear_group(
    x: Tensor,
    values: Sequence[Tensor],
    codes: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    compressed: Sequence[Tensor | None],
    dense: Sequence[Tensor | None],
) -> list[Tensor]:
    """`sparse_linear` of one x and several weights; see `reference.sparse_linear_group`.

    For inference: no gradient is defined. `compiler` makes these calls out of single ones.
    """
    for operands in zip(values, codes, bias, strict=True):
        _check_packed_product(x, *operands)
    return _op.sparse_linear_group(  # type: ignore[no-any-return]
        x, list(values), list(codes), list(bias), list(compressed), list(dense)
    )


def quantize_fp8(w: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows as e4m3 values and a scale each; see `reference.quantize_fp8`.

    Raises:
        ProxsparseError: w is no floating tensor with a dimension, holds NaN or infinity, or the
            scales do not fit. (Checking reads a flag back to the host; inside torch.compile it is
            skipped.)
    """
    if w.dim() == 0 or not w.is_floating_point() or w.element_size() == 1:
        raise ProxsparseError(
            f"w is {list(w.shape)} of {w.dtype}: rows of float32, bfloat16 or float16 are needed"
        )
    if scale is not None and (
        scale.shape != w.shape[:-1] or scale.dtype != torch.float32 or scale.device != w.device
    ):
        raise ProxsparseError(
            f"scale is {list(scale.shape)} of {scale.dtype} on {scale.device}; w needs "
            f"{list(w.shape[:-1])} of torch.float32 on {w.device}, a scale for each row"
        )
    if not torch.compiler.is_compiling() and not w.is_meta:
        _check_quantizable(w, scale)
    scale = None if scale is None else scale.contiguous()
    return _op.quantize_fp8(w.contiguous(), scale)  # type: ignore[no-any-return]


def _check_quantizable(w: Tensor, scale: Tensor | None) -> None:
    if not torch.isfinite(w).all():
        count = int((~torch.isfinite(w)).sum())
        raise ProxsparseError(
            f"w has {count} entries that are NaN or infinite, which no scale can hold: the weights "
            "are damaged or overflowed in float16; load sound ones"
        )
    if scale is not None and not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ProxsparseError("a scale is zero, negative, NaN or infinite: each must be positive")


def sparse_linear_fp8(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    dense: Tensor | None = None,
) -> Tensor:
    """The product with a packed 2:4 weight in FP8; see `reference.sparse_linear_fp8`.

    Gradients reach x, as if it had not been rounded, and the bias.
    """
    check_packed_2to4(values, codes)
    n, k = values.shape[0], 2 * values.shape[1]
    if values.dtype != FP8:
        raise ProxsparseError(
            f"values are {values.dtype}: sparse_linear_fp8 multiplies with {FP8}, sparse_linear "
            "with 16 and 32 bits"
        )
    check_weight_scale(values, weight_scale)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ProxsparseError(f"x is {x.dtype}: bfloat16, float16 or float32 is needed")
    if dense is not None and (list(dense.shape) != [n, k] or dense.dtype != FP8):
        raise ProxsparseError(
            f"dense is {list(dense.shape)} of {dense.dtype}: the same weight is [{n}, {k}] of {FP8}"
        )
    _check_features(x, values, bias)
    return _op.sparse_linear_fp8(  # type: ignore[no-any-return]
        x, values, codes, weight_scale, bias, dense
    )


def check_weight_scale(values: Tensor, weight_scale: Tensor) -> None:
    """Refuse scales that do not fit an FP8 weight, by all that can be told without reading them.

    Raises:
        ProxsparseError: another shape, dtype or device.
    """
    n = values.shape[0]
    if list(weight_scale.shape) != [n] or weight_scale.dtype != torch.float32:
        raise ProxsparseError(
            f"weight_scale is {list(weight_scale.shape)} of {weight_scale.dtype}: the weight has "
            f"{n} rows, each with a scale of torch.float32"
        )
    if weight_scale.device != values.device:
        raise ProxsparseError(
            f"values are on {values.device} and weight_scale on {weight_scale.device}: move the "
            "layer as a whole; meta means that a tensor is not in memory"
        )


def _check_packed_product(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None) -> None:
    check_packed_2to4(values, codes)
    if values.dtype == FP8:
        raise ProxsparseError("the values are FP8 and need a scale: use sparse_linear_fp8")
    if x.dtype != values.dtype:
        raise ProxsparseError(
            f"x is {x.dtype} on {x.device}, but the weight is {values.dtype} on {values.device}: "
            "they must agree"
        )
    _check_features(x, values, bias)


def _check_features(x: Tensor, values: Tensor, bias: Tensor | None) -> None:
    n, half = values.shape
    if x.dim() == 0 or x.shape[-1] != 2 * half:
        raise ProxsparseError(
            f"x is {list(x.shape)}, but the weight is [{n}, {2 * half}]: the last dimension must "
            f"be its in_features, {2 * half}"
        )
    if x.device != values.device:
        raise ProxsparseError(
            f"x is {x.dtype} on {x.device}, but the weight is {values.dtype} on {values.device}: "
            "they must agree"
        )
    if bias is not None and list(bias.shape) != [n]:
        raise ProxsparseError(f"bias is {list(bias.shape)}: the weight has {n} out_features")
    if bias is not None and (bias.dtype != x.dtype or bias.device != x.device):
        raise ProxsparseError(
            f"x is {x.dtype} on {x.device}, but the bias is {bias.dtype} on {bias.device}: they "
            "must agree"
        )


def check_packed_2to4(values: Tensor, codes: Tensor) -> None:
    """Refuse tensors that are no packed 2:4 weight, by all that can be told without reading them.

    Args:
        values: [N, K/2], from `pack_2to4`.
        codes: uint8 [N, ceil(K/8)], or tiles from `lay_out_2to4`, on the same device.

    Raises:
        ProxsparseError: another number of dimensions, shape, dtype or device.
    """
    n, half = values.shape if values.dim() == 2 else (0, 0)
    if (
        values.dim() != 2
        or half % 2
        or codes.shape not in ((n, (half + 3) // 4), _tiles_shape(values))
    ):
        raise ProxsparseError(
            f"values {list(values.shape)} and codes {list(codes.shape)} are no packed 2:4 weight: "
            "expected [N, K/2] and [N, ceil(K/8)] from pack_2to4, or codes in tiles"
        )
    is_8_bit = values.element_size() == 1
    if (
        codes.dtype != torch.uint8
        or not values.dtype.is_floating_point
        or (is_8_bit and values.dtype != FP8)
    ):
        raise ProxsparseError(
            f"values are {values.dtype} and codes {codes.dtype}: a packed 2:4 weight has "
            f"floating-point values (in 8 bits {FP8}) and codes of uint8, as pack_2to4 returns them"
        )
    if codes.device != values.device:
        raise ProxsparseError(
            f"values are on {values.device} and codes on {codes.device}: move the layer as a "
            "whole; meta means that a tensor is not in memory"
        )


def _tiles_shape(values: Tensor) -> tuple[int, int, int]:
    """Of the codes. Tiles for 8-bit values have another shape than others: none passes for both."""
    n, half = values.shape
    columns, size = (32, 512) if values.element_size() == 1 else (16, 256)
    return -(-n // 64), half // columns, size


def code_rows(values: Tensor, codes: Tensor) -> Tensor:
    """The codes of a packed weight as `pack_2to4` has them, in tiles or not.

    Args:
        values: [N, K/2].
        codes: uint8 [N, ceil(K/8)], returned as they are, or tiles from `lay_out_2to4`.

    Returns:
        uint8 [N, ceil(K/8)].
    """
    if codes.dim() == 2:
        return codes
    if codes.shape != _tiles_shape(values) or codes.dtype != torch.uint8:
        raise ProxsparseError(
            f"values {list(values.shape)} need tiles of codes of shape {_tiles_shape(values)} and "
            f"dtype uint8, not {list(codes.shape)} and {codes.dtype}"
        )
    is_8_bit = values.element_size() == 1
    untile = reference.untile_codes_8_bit if is_8_bit else reference.untile_codes
    return untile(codes, values.shape[0])


def lay_out_2to4(values: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """A packed weight in the order in which the kernels of its device read it.

    Args:
        values: [N, K/2], from `pack_2to4`.
        codes: uint8 [N, ceil(K/8)].

    Returns:
        (values, codes, compressed). On a GPU whose kernel for few tokens takes the weight, values
        and codes lie behind one another in one new buffer, the codes in tiles (see
        `reference.tile_codes`). Where that is what `compress_2to4` would make, `compressed` is the
        buffer, so that one copy serves all backends; else None. Elsewhere the arguments themselves
        and None.
    """
    is_cuda = values.device.type == "cuda"
    if not is_cuda or isinstance(implementation("sparse_linear", "cuda"), str):
        return values, codes, None
    from proxsparse.backends import weight_forms

    return weight_forms.lay_out_2to4(values, codes)


def known_speedups(
    device: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    has_bias: bool,
    tokens: Iterable[int],
    forms: Collection[str],
) -> dict[int, float]:
    """Token count -> speed-up over dense of what a packed layer runs on there, as measured.

    Args:
        device: index of a CUDA device.
        n: output features.
        k: input features.
        dtype: of weight and activations.
        has_bias: whether a bias is added.
        tokens: counts of interest; those nobody measured are left out of the result.
        forms: executors whose form of the weight the layer keeps.
    """
    from proxsparse.backends import table

    measured = table.table_for(device)
    return table.known_speedups(measured, n, k, dtype, has_bias, tokens, forms)


def predicted_speedups(
    device: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    has_bias: bool,
    tokens: Iterable[int],
    forms: Collection[str],
) -> dict[int, float]:
    """Token count -> speed-up over dense that the GPU's model predicts for a packed layer.

    Args and cost as of `known_speedups`; empty on a GPU whose tables ship no model.
    """
    from proxsparse.backends import table

    measured = table.table_for(device)
    return table.predicted_speedups(measured, n, k, dtype, has_bias, tokens, forms)


def can_compress(n: int, k: int, dtype: torch.dtype) -> str:
    """Why `compress_2to4` cannot take a weight [n, k] of this dtype here; empty when it can."""
    try:
        from proxsparse.backends import limits
    except ImportError as error:
        return str(error)
    return limits.can_compress(n, k, dtype)


def compress_2to4(w: Tensor) -> Tensor:
    """The form of a 2:4 weight that cuSPARSELt multiplies with, for `sparse_linear`'s `compressed`.

    Args:
        w: [N, K], bfloat16 or float16, on a CUDA device; N and K multiples of 16.

    Returns:
        uint8, 1-D, opaque: about 9/16 of w's bytes. There is no definition of it in `reference`;
        store what `pack_2to4` returns and make this anew.

    Raises:
        ProxsparseError: `can_compress` has a reason against it, w is not on a CUDA device, or a
            group has three or four non-zeros; the first one is named. (Checking reads one flag
            back to the host; inside torch.compile it is skipped.)
    """
    _check_groups("w", w)
    if w.dim() != 2:
        raise ProxsparseError(f"w is {list(w.shape)}: a weight [N, K] is needed")
    if w.device.type != "cuda":
        raise ProxsparseError(
            f"w is on {w.device}: cuSPARSELt's form of a weight exists on CUDA devices only"
        )
    reason = can_compress(w.shape[0], w.shape[1], w.dtype)
    if reason:
        raise ProxsparseError(f"w cannot be compressed: {reason}")
    w = w.contiguous()
    _check_2to4(w)
    return _op.compress_2to4(w)  # type: ignore[no-any-return]
