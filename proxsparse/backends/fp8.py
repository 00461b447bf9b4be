"""The FP8 product on a GPU: dense on the unpacked weight, or sparse by our kernels on Hopper.

`torch._scaled_mm` multiplies e4m3 numbers on tensor cores from compute capability 8.9 on. Its
results in bfloat16 take a scale for each row and each column along; others are scaled here.

Which of them is fastest is not measured yet, so the op runs dense; `run_by_name` runs any.
"""

from __future__ import annotations

import contextvars
import functools

import torch
from torch import Tensor

from proxsparse.backends.cusparselt import extension as _cuda
from proxsparse.backends.executors import DECODE_LAYOUTS, PREFILL_LAYOUTS
from proxsparse.backends.limits import CODES, MAX_HOPPER_TOKENS, can_multiply_fp8
from proxsparse.backends.stream_memory import current_stream, grow, memory_of
from proxsparse.backends.weight_forms import aligned
from proxsparse.errors import ProxsparseError
from proxsparse.ops import reference
from proxsparse.ops.reference import FP8

_MULTIPLE = 16  # that the dense product needs of both dimensions of the weight
EXECUTORS = ("dense", "prefill", "decode")


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
    n, half = values.shape
    _check_capability(x)
    if not x.numel() or not n or why_not_dense(n, 2 * half):
        return reference.sparse_linear_fp8(x, values, codes, weight_scale, bias, dense)
    return run_by_name("dense", x, values, codes, weight_scale, bias, dense)


def run_by_name(
    executor: str,
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dense: Tensor | None = None,
    layout: int = -1,
) -> Tensor:
    """`sparse_linear_fp8_cuda` on one executor.

    Args:
        executor: one of `EXECUTORS`.
        x: [..., K]; for our kernels in bfloat16 or float16, for "decode" at most 256 tokens.
        values: float8_e4m3fn [N, K/2].
        codes: uint8 [N, ceil(K/8)], or in tiles for 8-bit values.
        weight_scale: float32 [N].
        bias: [N] of x's dtype, or None.
        dense: float8_e4m3fn [N, K], or None.
        layout: of our kernels, an index of `PREFILL_LAYOUTS` or `DECODE_LAYOUTS`; by default the
            kernel's own choice.

    Raises:
        ProxsparseError: there is no such executor, or it cannot run these operands here.
        RuntimeError: the launch failed; its text and the shapes are named.
    """
    n, k = values.shape[0], 2 * values.shape[1]
    _check_capability(x)
    if executor == "dense":
        reason = why_not_dense(n, k)
    elif executor in EXECUTORS:
        most = MAX_HOPPER_TOKENS if executor == "decode" else None
        reason = can_multiply_fp8(n, k, x.numel() // k, x.dtype, x.get_device(), most)
    else:
        reason = f"there are {', '.join(EXECUTORS)}"
    if reason:
        raise ProxsparseError(f"{executor!r} cannot run sparse_linear_fp8: {reason}")
    with torch.cuda.device(x.device):
        x_values, x_scale = quantized(x.reshape(-1, k))
        if executor == "dense":
            w = unpacked(values, codes) if dense is None else dense
            y = multiply_dense(x_values, x_scale, w, weight_scale, bias, x.dtype)
        else:
            tiles = codes if codes.dim() == 3 else reference.tile_codes_8_bit(codes)
            make = prefill_kernel if executor == "prefill" else decode_kernel
            kernel = make(x.get_device(), x.dtype, n, k, layout)
            y = kernel(x_values, x_scale, values, tiles, weight_scale, bias)
    return y.view(*x.shape[:-1], n)


def _check_capability(x: Tensor) -> None:
    capability = torch.cuda.get_device_capability(x.device)
    if capability < (8, 9):
        raise ProxsparseError(
            f"products in FP8 need compute capability 8.9, and this GPU has {capability}: run the "
            "model packed in 16 bits, which proxsparse unpack and pack make of it"
        )


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


class Fp8Kernel:
    """Calls one of our kernels, in one of its layouts, for one weight shape."""

    def __init__(self, device: int, dtype: torch.dtype, n: int) -> None:
        self._device, self._dtype, self._n = device, dtype, n

    def __call__(
        self,
        x_values: Tensor,
        x_scale: Tensor,
        values: Tensor,
        tiles: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """The product [M, N] of rounded tokens [M, K]; codes are in tiles for 8-bit values."""
        x_values, values, tiles = aligned(x_values), aligned(values), aligned(tiles)
        x_scale, weight_scale = x_scale.contiguous(), weight_scale.contiguous()
        bias = None if bias is None else bias.contiguous()
        out = x_values.new_empty(x_values.shape[0], self._n, dtype=self._dtype)
        self._launch(
            *(x_values.shape[0], x_values.data_ptr(), x_scale.data_ptr(), values.data_ptr()),
            *(tiles.data_ptr(), weight_scale.data_ptr(), 0 if bias is None else bias.data_ptr()),
            # Not early: nothing says that the weight was complete before the kernel ahead began.
            *(out.data_ptr(), False, current_stream(self._device)),
        )
        return out

    def _launch(self, *operands: int) -> None:
        raise NotImplementedError


class Fp8Decode(Fp8Kernel):
    """The kernel for few tokens."""

    def __init__(self, device: int, dtype: torch.dtype, n: int, k: int, layout: int) -> None:
        super().__init__(device, dtype, n)
        chosen = (0, 0, 0) if layout < 0 else DECODE_LAYOUTS[layout]
        self._queue = _cuda.DecodeFp8(CODES[dtype], n, k, *chosen)

    def _launch(self, *operands: int) -> None:
        self._queue(*operands)


class Fp8Prefill(Fp8Kernel):
    """The kernel for many tokens."""

    def __init__(self, device: int, dtype: torch.dtype, n: int, k: int, layout: int) -> None:
        super().__init__(device, dtype, n)
        chosen = (0, 0, 0) if layout < 0 else PREFILL_LAYOUTS[layout][:3]
        self._queue = _cuda.PrefillFp8(CODES[dtype], n, k, *chosen)

    def _launch(self, *operands: int) -> None:
        stream = operands[-1]
        memory = memory_of(self._device, stream)
        needed = self._queue(*operands, memory.signals, memory.address, memory.size)
        if needed:
            memory = grow(memory, needed, self._device, stream)
            self._queue(*operands, memory.signals, memory.address, memory.size)


@functools.cache
def decode_kernel(device: int, dtype: torch.dtype, n: int, k: int, layout: int = -1) -> Fp8Kernel:
    """The kernel for few tokens and one weight shape, made once."""
    return Fp8Decode(device, dtype, n, k, layout)


@functools.cache
def prefill_kernel(device: int, dtype: torch.dtype, n: int, k: int, layout: int = -1) -> Fp8Kernel:
    """The kernel for many tokens and one weight shape, made once."""
    return Fp8Prefill(device, dtype, n, k, layout)
