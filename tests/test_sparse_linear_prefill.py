"""The kernel for many tokens: its logic on an emulator of CUDA's threads, its numbers on a GPU.

The emulator (tests/emulator) runs the .cu file itself, see test_sparse_linear_decode.py. With few
multiprocessors a block has several tiles, over whose ends the ring of copies runs on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.ops import reference

LAYOUTS = [
    (rows, tokens, cluster)
    for rows, tokens in (
        *((256, 192), (128, 256), (128, 128), (128, 64)),
        *((128, 192), (128, 160), (128, 96)),
    )
    for cluster in (1, 2)
]
SHARING = (128, 256, 2)  # in which 66 clusters share the 32 tiles of 4096 rows and 512 tokens
# A device, its multiprocessors and its major compute capability.
TWO, HOPPER, BLACKWELL = (0, 2, 9), (1, 132, 9), (2, 148, 10)


@pytest.fixture(scope="module")
def emulate(build_emulator: Callable[..., ctypes.CDLL]) -> Callable[..., Tensor]:
    """A function that runs the kernel on CPU tensors."""
    library = build_emulator("sparse_linear_prefill", "sparse_linear_prefill_hopper.cu")
    library.prefill.restype = ctypes.c_char_p

    def run(
        x: Tensor,
        values: Tensor,
        codes: Tensor,
        bias: Tensor | None = None,
        layout: tuple[int, int, int] = (0, 0, 0),
        *,
        early: bool = False,
        descending: bool = False,
        device: tuple[int, int, int] = TWO,
        is_shared: bool = False,
    ) -> Tensor:
        y = torch.full((x.shape[0] + 1, values.shape[0]), torch.nan, dtype=x.dtype)
        tensors = x, values, codes, bias, y
        signals = torch.zeros(8 * device[1], dtype=torch.int32)
        workspace, needed = torch.empty(0), ctypes.c_size_t(0)
        for _ in range(2):
            error = library.prefill(
                *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors),
                *(*x.shape, values.shape[0], ctypes.c_int64(x.stride(0))),
                *(x.dtype == torch.bfloat16, *layout, ctypes.c_void_p(workspace.data_ptr())),
                ctypes.c_size_t(4 * workspace.numel()),
                ctypes.c_void_p(signals.data_ptr() if is_shared else None),
                *(early, descending, *device, ctypes.byref(needed)),
            )
            assert error is None, error.decode()
            if not needed.value:
                break
            workspace = torch.full((needed.value // 4,), torch.nan)
        assert not needed.value
        assert bool(workspace.numel()) == is_shared
        assert not signals.any()
        assert y[-1].isnan().all()
        return y[:-1]

    return run


def make(
    m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, w, values, tiled codes and a bias of small whole numbers: every sum is exact."""
    generator = torch.Generator().manual_seed(m + n + k)
    w = torch.randint(-4, 5, (n, k), generator=generator).to(dtype)
    w = ops.project_2to4(w, torch.rand(n, k, generator=generator).to(dtype))
    x = torch.randint(-3, 4, (m, k), generator=generator).to(dtype)
    bias = torch.randint(-9, 10, (n,), generator=generator).to(dtype)
    return x, w, *pack(w), bias


def pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """Values and tiled codes."""
    values, codes = ops.pack_2to4(w)
    return values, reference.tile_codes(codes)


def exact(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ w.double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(
    emulate: Callable[..., Tensor], layout: tuple[int, int, int], descending: bool, early: bool
) -> None:
    # Several tiles a block, none of the last ones whole, more chunks than the ring has stages.
    x, w, values, codes, bias = make(layout[1] + 40, 2 * layout[0] + 72, 64 * 11)
    y = emulate(x, values, codes, bias, layout, early=early, descending=descending)
    assert torch.equal(y, exact(x, w, bias))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("k", [64, 128, 192])
@pytest.mark.parametrize(
    "layout",
    [(256, 192, 1), (128, 256, 1), (128, 64, 1), (128, 64, 2), (128, 96, 2)],
)
def test_tiles_shorter_than_the_ring(
    emulate: Callable[..., Tensor],
    layout: tuple[int, int, int],
    k: int,
    descending: bool,
    early: bool,
) -> None:
    x, w, values, codes, bias = make(2 * layout[1] + 8, 3 * layout[0], k)
    y = emulate(x, values, codes, bias, layout, early=early, descending=descending)
    assert torch.equal(y, exact(x, w, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n"), [(1, 8), (64, 128), (65, 136), (600, 72)])
def test_every_size(emulate: Callable[..., Tensor], m: int, n: int, dtype: torch.dtype) -> None:
    x, w, values, codes, _ = make(m, n, 192, dtype)
    assert torch.equal(emulate(x, values, codes), exact(x, w))
    assert torch.equal(emulate(x, values, codes, device=HOPPER), exact(x, w))


@pytest.mark.parametrize(
    ("layout", "has_bias"),
    [
        pytest.param(layout, has_bias, marks=[] if has_bias == bool(i % 2) else pytest.mark.slow)
        for i, layout in enumerate(LAYOUTS)
        for has_bias in (False, True)
    ],
)
def test_tiles_that_blocks_share(
    emulate: Callable[..., Tensor], layout: tuple[int, int, int], has_bias: bool
) -> None:
    rows, tokens, cluster = layout
    # Enough to be worth it.
    k = 64 * (32 if rows * tokens > 128 * 192 else 40 if tokens > 160 else 64)
    device = (10 + cluster, 5 * cluster, 9)
    # Two or three clusters share one tile, and four share two: the last part of each is longer.
    # Five share six, or of twelve the last seven: at most three take part in one, and some have the
    # end of one, a whole one and the beginning of a third.
    for row_tiles, token_tiles in ((1, 1), (1, 2), (2, 3), (12, 1)):
        m, n = token_tiles * tokens - 40, row_tiles * rows * cluster - 56
        x, w, values, codes, bias = make(m, n, k)
        y = emulate(
            *(x, values, codes, bias if has_bias else None, layout),
            **{"descending": has_bias, "device": device, "is_shared": True},
        )
        assert torch.equal(y, exact(x, w, bias if has_bias else None))


def test_bands_of_token_tiles(emulate: Callable[..., Tensor]) -> None:
    x, w, values, codes, bias = make(64 * 19, 128 * 3, 64)
    assert torch.equal(emulate(x, values, codes, bias, (128, 64, 1)), exact(x, w, bias))


def test_groups_with_fewer_than_two_entries(emulate: Callable[..., Tensor]) -> None:
    x, w, *_ = make(70, 128, 256)
    w[::3] = 0
    w[:, 5::4] = 0
    assert torch.equal(emulate(x, *pack(w)), exact(x, w))


def test_rows_of_a_wider_tensor(emulate: Callable[..., Tensor]) -> None:
    x, w, values, codes, _ = make(66, 64, 256)
    wide = torch.full((66, 264), torch.nan, dtype=x.dtype)
    wide[:, :256] = x
    assert torch.equal(emulate(wide[:, :256], values, codes), exact(x, w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_float32_sums(
    emulate: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    w = ops.project_2to4(torch.randn(64, 1024).to(dtype))
    x = torch.randn(64, 1024).to(dtype)
    expected = x.double() @ w.double().T
    error = (emulate(x, *pack(w)).double() - expected).norm() / expected.norm()
    rounding = (expected.to(dtype).double() - expected).norm() / expected.norm()
    assert error < 1.1 * rounding


@pytest.mark.parametrize(
    ("n", "k", "layout", "device", "message"),
    [
        (64, 96, (0, 0, 0), HOPPER, "in_features must be a multiple of 64"),
        (60, 64, (0, 0, 0), HOPPER, "out_features must be a multiple of 8"),
        (64, 64, (192, 64, 1), HOPPER, "no such layout"),
        (64, 64, (0, 0, 4), HOPPER, "no such layout"),
        (64, 64, (0, 0, 0), BLACKWELL, "compute capability 9.0"),
    ],
)
def test_refuses_what_it_cannot(
    emulate: Callable[..., Tensor],
    n: int,
    k: int,
    layout: tuple[int, int, int],
    device: tuple[int, int, int],
    message: str,
) -> None:
    x, _, values, codes, _ = make(4, n, k)
    with pytest.raises(AssertionError, match=message):
        emulate(x, values, codes, None, layout, device=device)


def test_refuses_what_is_misaligned(emulate: Callable[..., Tensor]) -> None:
    x, _, values, codes, _ = make(4, 16, 128)
    with pytest.raises(AssertionError, match="aligned to 16 bytes"):
        emulate(x[:, 4:68], values[:, :32].contiguous(), codes[:, :2].contiguous())


@pytest.fixture
def executors() -> Any:
    """The executors' module, on a GPU that the kernel is for."""
    executors = pytest.importorskip("proxsparse.backends.executors")
    if not executors._cuda.has_kernels:
        pytest.fail("the extension was built without its CUDA kernels")
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is for compute capability 9.0")
    return executors


@pytest.mark.sparse_tc
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [65, 160, 512, 1000, 1024])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1040, 1088), (5120, 5120), (512, 3584)])
def test_every_layout_on_a_gpu(executors: Any, n: int, k: int, m: int, dtype: torch.dtype) -> None:
    x, w, values, codes, bias = (t.cuda() for t in make(m, n, k, dtype))
    expected = exact(x, w, bias)
    for layout in ((0, 0, 0), *executors.PREFILL_LAYOUTS):
        run = executors.Prefill(layout, 0, dtype, n, k)
        torch.full((m, n), torch.nan, dtype=dtype, device="cuda")  # poisons what run reuses
        for _ in range(3):
            assert torch.equal(run(x, values, codes, bias), expected), layout


@pytest.mark.sparse_tc
def test_graphs_that_run_at_once_share_no_signals(executors: Any) -> None:
    from proxsparse.backends import stream_memory

    n = k = 4096
    _, w, values, codes, _ = (t.cuda() for t in make(8, n, k))
    run = executors.Prefill(SHARING, 0, torch.bfloat16, n, k)
    inputs = [torch.randint(-3, 4, (512, k), device="cuda").bfloat16() for _ in range(3)]
    expected = [exact(x, w) for x in inputs]
    stream_memory._memories.clear()
    run(inputs[0], values, codes, None)
    assert stream_memory._memories[0, 0].workspace is not None, "the layout shares no tiles"
    streams, graphs, results = [], [], []
    for x in inputs[:2]:
        streams.append(torch.cuda.Stream())
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=streams[-1]):
            results.append([run(x, values, codes, None) for _ in range(3)])
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = run(inputs[2], values, codes, None)
        torch.cuda.synchronize()
        assert torch.equal(eager, expected[2])
        for of_graph, right in zip(results, expected, strict=False):
            assert all(torch.equal(result, right) for result in of_graph)


@pytest.mark.sparse_tc
def test_a_graph_that_finds_no_signals_shares_no_tiles(
    executors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxsparse.backends import stream_memory

    x, w, values, codes, _ = (t.cuda() for t in make(512, 4096, 4096))
    run = executors.Prefill(SHARING, 0, torch.bfloat16, 4096, 4096)
    stream_memory._memories.clear()
    run(x, values, codes, None)
    assert stream_memory._memories[0, 0].workspace is not None, "the layout shares no tiles"
    monkeypatch.setitem(stream_memory._stock_of_signals, 0, [])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(x, values, codes, None)
    graph.replay()
    assert torch.equal(result, exact(x, w))
    assert torch.equal(run(x, values, codes, None), exact(x, w))
    assert stream_memory._stock_of_signals[0], "the next call outside a capture fills the stock up"


@pytest.mark.sparse_tc
def test_where_nothing_was_measured_it_runs_instead_of_unpacking(executors: Any) -> None:
    from proxsparse.backends import cuda as backend

    x, w, values, codes, bias = (t.cuda() for t in make(128, 512, 640))
    run = backend.find_run(x, values, codes, bias, None, None)
    assert isinstance(run, executors.Prefill)
    y = ops.sparse_linear(x.view(2, 64, 640), values, codes, bias)
    assert torch.equal(y.view(128, 512), exact(x, w, bias))
