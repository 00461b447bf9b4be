"""The FP8 kernel for many tokens: its logic on the emulator, its numbers on a GPU.

See test_sparse_linear_prefill.py: it is the same kernel on other operands. Small whole numbers make
every sum exact, and powers of two as scales every result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from fp8_operands import Operands
from torch import Tensor

from proxsparse import ops

LAYOUTS = [
    (rows, tokens, cluster)
    for rows, tokens in ((128, 256), (128, 128), (128, 64))
    for cluster in (1, 2)
]
# A device, its multiprocessors and its major compute capability.
TWO, HOPPER, BLACKWELL = (0, 2, 9), (1, 132, 9), (2, 148, 10)


@pytest.fixture(scope="module")
def library(build_emulator: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    found = build_emulator("sparse_linear_prefill", "sparse_linear_prefill_hopper.cu")
    found.prefill_fp8.restype = ctypes.c_char_p
    return found


@pytest.fixture(scope="module")
def emulate(library: ctypes.CDLL) -> Callable[..., Tensor]:
    """A function that runs the kernel on CPU tensors."""

    def run(
        of: Operands,
        layout: tuple[int, int, int] = (0, 0, 0),
        *,
        has_bias: bool = True,
        early: bool = False,
        descending: bool = False,
        device: tuple[int, int, int] = TWO,
        is_shared: bool = False,
    ) -> Tensor:
        (m, k), n = of.x.shape, of.values.shape[0]
        y = torch.full((m + 1, n), torch.nan, dtype=of.dtype)
        signals = torch.zeros(8 * device[1], dtype=torch.int32)
        workspace, needed = torch.empty(0), ctypes.c_size_t(0)
        bias = of.bias if has_bias else None
        tensors = of.x, of.values, of.tiles, bias, y, of.token_scales, of.row_scales
        for _ in range(2):
            error = library.prefill_fp8(
                *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors),
                *(m, k, n, of.dtype == torch.bfloat16, *layout),
                ctypes.c_void_p(workspace.data_ptr()),
                ctypes.c_size_t(4 * workspace.numel()),
                ctypes.c_void_p(signals.data_ptr() if is_shared else None),
                *(early, descending, *device, ctypes.byref(needed)),
            )
            assert error is None, error.decode()
            if not needed.value:
                break
            workspace = torch.full((needed.value // 4,), torch.nan)
        assert not needed.value and not signals.any()
        assert bool(workspace.numel()) == is_shared
        assert y[-1].isnan().all()
        return y[:-1]

    return run


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(
    emulate: Callable[..., Tensor], layout: tuple[int, int, int], descending: bool, early: bool
) -> None:
    # Several tiles a block, none of the last ones whole, more chunks than the ring has stages.
    of = Operands(layout[1] + 40, 2 * layout[0] + 72, 128 * 7)
    y = emulate(of, layout, early=early, descending=descending)
    assert torch.equal(y, of.exact())


@pytest.mark.parametrize("k", [128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n"), [(1, 8), (65, 136), (300, 72)])
def test_every_size(
    emulate: Callable[..., Tensor], m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    of = Operands(m, n, k, dtype)
    assert torch.equal(emulate(of, has_bias=False), of.exact(has_bias=False))
    assert torch.equal(emulate(of, device=HOPPER), of.exact())


@pytest.mark.parametrize("layout", [(128, 256, 1), (128, 256, 2), (128, 64, 1)])
def test_tiles_that_blocks_share(
    emulate: Callable[..., Tensor], layout: tuple[int, int, int]
) -> None:
    rows, tokens, cluster = layout
    k = 128 * (32 if tokens > 128 else 64)  # enough to be worth it
    device = (10 + cluster, 5 * cluster, 9)
    # Clusters share one tile, and five share six: sums are passed on before they are scaled.
    for row_tiles, token_tiles in ((1, 1), (2, 3)):
        of = Operands(token_tiles * tokens - 40, row_tiles * rows * cluster - 56, k)
        y = emulate(of, layout, device=device, is_shared=True)
        assert torch.equal(y, of.exact())


def test_refusals(library: ctypes.CDLL) -> None:
    def refusal(k: int, n: int, has_scales: bool = True, device: tuple[int, int, int] = TWO) -> str:
        of = Operands(4, n, k)
        y, needed = torch.empty(4, n, dtype=torch.bfloat16), ctypes.c_size_t(0)
        scales = (of.token_scales, of.row_scales) if has_scales else (None, None)
        error = library.prefill_fp8(
            *(
                ctypes.c_void_p(None if t is None else t.data_ptr())
                for t in (of.x, of.values, of.codes, None, y, *scales)
            ),
            *(4, k, n, True, 0, 0, 0, ctypes.c_void_p(None), ctypes.c_size_t(0)),
            *(ctypes.c_void_p(None), False, False, *device, ctypes.byref(needed)),
        )
        return error.decode() if error else ""

    assert "in_features must be a multiple of 128" in refusal(192, 64)
    assert "out_features must be a multiple of 8" in refusal(128, 12)
    assert "need scales of rows and tokens" in refusal(128, 64, has_scales=False)
    assert "compute capability 9.0 is needed" in refusal(128, 64, device=BLACKWELL)


def _has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def _fp8_on_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


needs_hopper = pytest.mark.skipif(not _has_hopper(), reason="needs compute capability 9.0")
needs_fp8 = pytest.mark.skipif(not _fp8_on_gpu(), reason="needs compute capability 8.9")


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [-1, *range(2, 8)])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 8, 128), (65, 136, 384), (600, 1096, 1408), (1024, 4096, 4096), (200, 256, 16384)],
)
def test_kernel_is_exact_on_whole_numbers(
    m: int, n: int, k: int, layout: int, dtype: torch.dtype
) -> None:
    from proxsparse.backends.fp8 import prefill_kernel

    of = Operands(m, n, k, dtype)
    operands = of.x, of.token_scales, of.values, of.tiles, of.row_scales, of.bias
    on_gpu = [x.cuda() for x in operands]
    kernel = prefill_kernel(torch.cuda.current_device(), dtype, n, k, layout)
    y = kernel(*on_gpu)
    assert torch.equal(y.cpu(), of.exact())
    assert torch.equal(kernel(*on_gpu[:-1], None).cpu(), of.exact(has_bias=False))
    for _ in range(3):
        assert torch.equal(kernel(*on_gpu), y)


@pytest.mark.gpu
@needs_fp8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(256, 512), (1024, 4096), (512, 28672)])
@pytest.mark.parametrize("m", [1, 16, 300])
def test_executors_agree_with_float64(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """On the same rounded operands; fast sums lose some digits, see docs/fp8.md."""
    from proxsparse.backends.fp8 import quantized, run_by_name

    generator = torch.Generator().manual_seed(0)
    w = ops.project_2to4(torch.randn(n, k, generator=generator))
    values, scale = ops.quantize_fp8(w)
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    x_values, x_scale = ops.quantize_fp8(x)
    on_gpu, scale_on_gpu = (t.cpu() for t in quantized(x.cuda()))
    assert torch.equal(scale_on_gpu, x_scale)
    assert torch.equal(on_gpu.view(torch.uint8), x_values.view(torch.uint8))
    exact = x_values.double() @ values.double().T * x_scale.double()[:, None] * scale.double()
    exact += bias.double()
    packed = [t.cuda() for t in (*ops.pack_2to4(values), scale, bias)]
    errors = {}
    ours = ("prefill", *(["decode"] if m <= 256 else [])) if _has_hopper() else ()
    for executor in ("dense", *ours):
        y = run_by_name(executor, x.cuda(), *packed)
        again = run_by_name(executor, x.cuda(), *packed)
        assert torch.equal(y, again), executor
        errors[executor] = ((y.cpu().double() - exact).norm() / exact.norm()).item()
    op = ops.sparse_linear_fp8(x.cuda(), *packed)
    assert torch.equal(op, run_by_name("dense", x.cuda(), *packed))
    assert max(errors.values()) < 5e-3, errors
    assert max(errors.values()) <= 1.1 * errors["dense"] + 1e-5, errors


@pytest.mark.gpu
@needs_fp8
def test_layers_run_eagerly_compiled_and_in_a_graph() -> None:
    from torch import nn

    from proxsparse import SparseLinear

    linear = nn.Linear(512, 256, device="cuda", dtype=torch.bfloat16)
    linear.weight.data = ops.project_2to4(linear.weight.data)
    for keep_dense in (False, True):
        layer = SparseLinear.from_linear(linear, quantize="FP8_DYNAMIC", keep_dense=keep_dense)
        x = torch.randn(32, 512, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            y = layer(x)
            with ops.use_backend("reference"):
                expected = layer(x)
            torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
            assert torch.equal(torch.compile(layer, fullgraph=True)(x), y)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = layer(x)
            graph.replay()
            assert torch.equal(captured, y)


@pytest.mark.gpu
@needs_fp8
def test_names_that_do_not_run() -> None:
    from proxsparse import ProxsparseError
    from proxsparse.backends.fp8 import run_by_name

    of = Operands(4, 24, 64)
    operands = [t.cuda() for t in (of.values, of.codes, of.row_scales)]
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    for name, message in (
        ("dense", "must be multiples of 16"),
        ("prefill", "in_features must be a multiple of 128"),
        ("decode", "in_features must be a multiple of 128"),
        ("marlin", "there are dense, prefill, decode"),
    ):
        with pytest.raises(ProxsparseError, match=message):
            run_by_name(name, x, *operands)
    # Where the dense product cannot run, the definition does.
    y = ops.sparse_linear_fp8(x, *operands)
    expected = ops.sparse_linear_fp8(x.cpu(), of.values, of.codes, of.row_scales)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-2, atol=1e-2)
