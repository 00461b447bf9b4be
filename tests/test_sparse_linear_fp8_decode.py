"""The FP8 kernel for few tokens: its logic on the emulator, its numbers on a GPU.

See test_sparse_linear_decode.py: on Hopper it is the same kernel on other operands. Small whole
numbers make every sum exact, and powers of two as scales every result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from fp8_operands import Operands
from torch import Tensor

# A device, the bytes a block may share, and its major compute capability.
HOPPER, BLACKWELL = (0, 227 * 1024, 9), (2, 227 * 1024, 10)


class Weight(ctypes.Structure):
    """`DecodeWeight` of csrc/cuda/sparse_linear_decode.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("values", "codes", "bias", "y")]
    _fields_ += [("out_features", ctypes.c_int), ("row_scales", ctypes.c_void_p)]


Decode = Callable[..., Tensor]


@pytest.fixture(scope="module")
def decode(build_emulator: Callable[..., ctypes.CDLL]) -> Callable[..., bytes | None]:
    """The kernel's launch, on the emulator."""
    kernels = ["sparse_linear_decode.cu", "sparse_linear_decode_hopper.cu"]
    function = build_emulator("sparse_linear_decode", *kernels).decode_fp8
    function.restype = ctypes.c_char_p

    def run(
        of: Operands,
        y: Tensor,
        layout: tuple[int, int, int],
        has_bias: bool,
        early: bool,
        descending: bool,
        device: tuple[int, int, int],
    ) -> bytes | None:
        pointers = [t.data_ptr() for t in (of.values, of.tiles, of.bias, y)]
        if not has_bias:
            pointers[2] = None
        weight = Weight(*pointers, y.shape[1], of.row_scales.data_ptr())
        result: bytes | None = function(
            ctypes.c_void_p(of.x.data_ptr()),
            ctypes.c_void_p(of.token_scales.data_ptr()),
            *(ctypes.byref(weight), 1, *of.x.shape, of.dtype == torch.bfloat16),
            *(*layout, early, descending, *device),
        )
        return result

    return run


@pytest.fixture(scope="module")
def emulate(decode: Callable[..., bytes | None]) -> Decode:
    """A function that runs the kernel on CPU tensors."""

    def run(
        of: Operands,
        layout: tuple[int, int, int] = (0, 0, 0),
        *,
        has_bias: bool = True,
        early: bool = False,
        descending: bool = False,
    ) -> Tensor:
        y = torch.full((of.x.shape[0], of.values.shape[0]), torch.nan, dtype=of.dtype)
        error = decode(of, y, layout, has_bias, early, descending, HOPPER)
        assert error is None, error.decode()
        return y

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 33, 64, 65, 130])
def test_every_token_count(emulate: Decode, m: int, dtype: torch.dtype) -> None:
    of = Operands(m, 80, 640, dtype)  # ends half way through a chunk
    assert torch.equal(emulate(of), of.exact())
    assert torch.equal(emulate(of, has_bias=False), of.exact(has_bias=False))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("rows", [64, 128, 256])
def test_every_layout(
    emulate: Decode, rows: int, depth: int, splits: int, descending: bool, early: bool
) -> None:
    of = Operands(3, rows + 72, 128 * 21)
    y = emulate(of, (rows, depth, splits), early=early, descending=descending)
    assert torch.equal(y, of.exact())


def test_rows_that_pair_up_with_nothing(emulate: Decode) -> None:
    of = Operands(3, 65, 256)
    assert torch.equal(emulate(of), of.exact())


def test_refusals(decode: Callable[..., bytes | None]) -> None:
    def refusal(k: int, device: tuple[int, int, int] = HOPPER, has_scales: bool = True) -> str:
        of = Operands(4, 64, 256)
        of.x = of.x[:, :k].contiguous()
        if not has_scales:
            of.token_scales = torch.empty(0)
        y = torch.empty(4, 64, dtype=torch.bfloat16)
        error = decode(of, y, (0, 0, 0), False, False, False, device)
        return error.decode() if error else ""

    assert "in_features must be a multiple of 128" in refusal(192)
    assert "compute capability 9.0 is needed" in refusal(256, BLACKWELL)
    assert "need scales of rows and tokens" in refusal(256, has_scales=False)


needs_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9),
    reason="needs compute capability 9.0",
)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 8, 16, 32, 64, 200])
@pytest.mark.parametrize(("n", "k"), [(80, 640), (4096, 4096), (264, 16384)])
def test_kernel_is_exact_on_whole_numbers(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    from proxsparse.backends.executors import DECODE_LAYOUTS
    from proxsparse.backends.fp8 import decode_kernel

    of = Operands(m, n, k, dtype)
    operands = of.x, of.token_scales, of.values, of.tiles, of.row_scales, of.bias
    on_gpu = [x.cuda() for x in operands]
    for layout in (-1, *range(0, len(DECODE_LAYOUTS), 5)):
        kernel = decode_kernel(torch.cuda.current_device(), dtype, n, k, layout)
        y = kernel(*on_gpu)
        assert torch.equal(y.cpu(), of.exact()), layout
        assert torch.equal(kernel(*on_gpu), y)
    assert torch.equal(kernel(*on_gpu[:-1], None).cpu(), of.exact(has_bias=False))
