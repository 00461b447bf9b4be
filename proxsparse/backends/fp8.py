"""The FP8 product on a GPU: dense, on the unpacked weight, with activations rounded before it.

`torch._scaled_mm` multiplies e4m3 numbers on tensor cores from compute capability 8.9 on. Its
results in bfloat16 take a scale for each row and each column along; others are scaled here.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from proxsparse.errors import ProxsparseError
from proxsparse.ops import reference
from proxsparse.ops.reference import FP8

_MULTIPLE = 16  # that the dense product needs of both dimensions of the weight
# x, values, codes, weight_scale, bias, dense -> result
Fp8Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def why_not_dense(n: int, k: int) -> str:
    """Why the dense FP8 product cannot take a weight [n, k]; empty when it can."""
    if n % _MULTIPLE or k % _MULTIPLE:
        return (
            f"both dimensions of the weight must be multiples of {_MULTIPLE}, and it is [{n}, {k}]"
        )
    return ""


def sparse_linear_fp8_cuda(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dense: Tensor | None,
) -> Tensor:
    """See `reference.sparse_linear_fp8`; runs dense in FP8, on the weight unpacked.

    Args:
        x: [..., K], bfloat16, float16 or float32.
        values: float8_e4m3fn [N, K/2].
        codes: uint8 [N, ceil(K/8)], or in tiles for 8-bit values.
        weight_scale: float32 [N].
        bias: [N] of x's dtype, or None.
        dense: float8_e4m3fn [N, K], or None: then it is unpacked for the call.

    Returns:
        [..., N] of x's dtype. A weight whose dimensions are no multiples of 16 is multiplied as the
        definition does.

    Raises:
        ProxsparseError: the GPU has no FP8 tensor cores.
    """
    capability = torch.cuda.get_device_capability(x.device)
    if capability < (8, 9):
        raise ProxsparseError(
            f"products in FP8 need compute capability 8.9, and this GPU has {capability}: run the "
            "model packed in 16 bits, which proxsparse unpack and pack make of it"
        )
    n, half = values.shape
    if not x.numel() or not n or why_not_dense(n, 2 * half):
        return reference.sparse_linear_fp8(x, values, codes, weight_scale, bias, dense)
    with torch.cuda.device(x.device):
        w = unpacked(values, codes) if dense is None else dense
        x_values, x_scale = quantized(x.reshape(-1, 2 * half))
        y = multiply_dense(x_values, x_scale, w, weight_scale, bias, x.dtype)
    return y.view(*x.shape[:-1], n)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_fp8` of tokens [M, K], by the best backend of their device."""
    # In a context of its own: a backend forced on the caller has no say in this.
    op = torch.ops.proxsparse.quantize_fp8
    result: tuple[Tensor, Tensor] = contextvars.Context().run(op, x.contiguous(), None)
    return result


def unpacked(values: Tensor, codes: Tensor) -> Tensor:
    """The dense weight [N, K] in FP8, moved as bytes."""
    if codes.dim() == 3:
        codes = reference.untile_codes_8_bit(codes, values.shape[0])
    op = torch.ops.proxsparse.unpack_2to4
    bits: Tensor = contextvars.Context().run(op, values.view(torch.uint8), codes)
    return bits.view(FP8)


def multiply_dense(
    x_values: Tensor,
    x_scale: Tensor,
    w: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The product [M, N] of rounded tokens [M, K] with a dense weight [N, K], with fast sums."""
    if dtype == torch.bfloat16:
        y: Tensor = torch._scaled_mm(
            x_values,
            w.t(),
            scale_a=x_scale.unsqueeze(1),
            scale_b=weight_scale.unsqueeze(0),
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=True,
        )
        return y
    one = _one(x_values.get_device())
    sums = torch._scaled_mm(
        x_values, w.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True
    )
    sums = sums.mul_(x_scale.unsqueeze(1)).mul_(weight_scale)
    return (sums if bias is None else sums.add_(bias.float())).to(dtype)


@functools.cache
def _one(device: int) -> Tensor:
    return torch.ones((), device=torch.device("cuda", device))
