"""The decode kernels: their logic on an emulator of CUDA's threads, their numbers on a GPU.

The emulator (tests/emulator) runs the .cu files in csrc/cuda themselves, compiled for the CPU with
the instructions of ptx.h and hopper.h replaced by the layouts that the PTX manual gives them. So
packing, fragments, metadata, pipelines and reductions are checked on any machine with a compiler,
Hopper's kernel and that of all other GPUs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.ops import reference

# A device, the shared memory of its blocks and its major compute capability.
HOPPER, ADA, BLACKWELL = (0, 227 * 1024, 9), (1, 99 * 1024, 8), (2, 227 * 1024, 10)
BOTH_KERNELS = pytest.mark.parametrize("device", [HOPPER, BLACKWELL], ids=["hopper", "blackwell"])


class Weight(ctypes.Structure):
    """`DecodeWeight` of csrc/cuda/sparse_linear_decode.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("values", "codes", "bias", "y")]
    _fields_ += [("out_features", ctypes.c_int), ("row_scales", ctypes.c_void_p)]


@pytest.fixture(scope="module")
def emulate_group(build_emulator: Callable[..., ctypes.CDLL]) -> Callable[..., list[Tensor]]:
    """A function that multiplies the same CPU tensor with several weights, in one call."""
    kernels = ["sparse_linear_decode.cu", "sparse_linear_decode_hopper.cu"]
    decode = build_emulator("sparse_linear_decode", *kernels).decode
    decode.restype = ctypes.c_char_p

    def run(
        x: Tensor,
        operands: list[tuple[Tensor, Tensor, Tensor | None]],
        layout: tuple[int, int, int] = (0, 0, 0),
        *,
        early: bool = False,
        descending: bool = False,
        device: tuple[int, int, int] = HOPPER,
    ) -> list[Tensor]:
        results = [
            torch.full((x.shape[0], values.shape[0]), torch.nan, dtype=x.dtype)
            for values, _, _ in operands
        ]
        weights = (Weight * len(operands))()
        for weight, (values, codes, bias), y in zip(weights, operands, results, strict=True):
            pointers = [t if t is None else t.data_ptr() for t in (values, codes, bias, y)]
            weight.values, weight.codes, weight.bias, weight.y = pointers
            weight.out_features = values.shape[0]
        error = decode(
            *(ctypes.c_void_p(x.data_ptr()), weights, len(operands), *x.shape),
            ctypes.c_int64(x.stride(0)),
            x.dtype == torch.bfloat16,
            *layout,
            *(early, descending, *device),
        )
        assert error is None, error.decode()
        return results

    return run


@pytest.fixture(scope="module")
def emulate(emulate_group: Callable[..., list[Tensor]]) -> Callable[..., Tensor]:
    """A function that runs the kernel with one weight on CPU tensors."""

    def run(
        x: Tensor,
        values: Tensor,
        codes: Tensor,
        bias: Tensor | None = None,
        *layout: tuple[int, int, int],
        **how: Any,
    ) -> Tensor:
        (y,) = emulate_group(x, [(values, codes, bias)], *layout, **how)
        return y

    return run


def make(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, values and tiled codes of small whole numbers: every sum is exact in float32."""
    generator = torch.Generator().manual_seed(m + n + k)
    w = torch.randint(-4, 5, (n, k), generator=generator).to(dtype)
    w = ops.project_2to4(w, torch.rand(n, k, generator=generator).to(dtype))
    x = torch.randint(-3, 4, (m, k), generator=generator).to(dtype)
    return x, w, *pack(w)


def pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """Values and tiled codes."""
    values, codes = ops.pack_2to4(w)
    return values, reference.tile_codes(codes)


def exact(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ w.double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 33, 64])
@BOTH_KERNELS
def test_every_token_count(
    emulate: Callable[..., Tensor], device: tuple[int, int, int], m: int, dtype: torch.dtype
) -> None:
    x, w, values, codes = make(m, 80, 320, dtype)
    assert torch.equal(emulate(x, values, codes, device=device), exact(x, w))


@pytest.mark.parametrize(("m", "layout"), [(65, (0, 0, 0)), (200, (128, 2, 2)), (130, (256, 1, 1))])
def test_more_tokens_than_a_block_takes(
    emulate: Callable[..., Tensor], m: int, layout: tuple[int, int, int]
) -> None:
    x, w, values, codes = make(m, 144, 320, torch.bfloat16)
    assert torch.equal(emulate(x, values, codes, None, layout), exact(x, w))


def test_rows_that_pair_up_with_nothing(emulate: Callable[..., Tensor]) -> None:
    x, w, values, codes = make(3, 65, 128, torch.bfloat16)
    bias = torch.randint(-9, 10, (65,)).bfloat16()
    assert torch.equal(emulate(x, values, codes, bias), exact(x, w, bias))


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("rows", [64, 128, 256])
@BOTH_KERNELS
def test_every_layout(
    emulate: Callable[..., Tensor],
    device: tuple[int, int, int],
    rows: int,
    depth: int,
    splits: int,
    m: int,
) -> None:
    x, w, values, codes = make(m, 144, 64 * 37, torch.bfloat16)
    bias = torch.randint(-9, 10, (144,)).bfloat16()
    y = emulate(x, values, codes, bias, (rows, depth, splits), device=device)
    assert torch.equal(y, exact(x, w, bias))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("layout", [(64, 1, 1), (64, 2, 2), (128, 2, 1), (128, 1, 4), (256, 2, 2)])
@BOTH_KERNELS
def test_copies_and_threads_in_any_order(
    emulate: Callable[..., Tensor],
    device: tuple[int, int, int],
    layout: tuple[int, int, int],
    early: bool,
    descending: bool,
) -> None:
    x, w, values, codes = make(12, 128, 256 * 11, torch.bfloat16)
    y = emulate(x, values, codes, None, layout, early=early, descending=descending, device=device)
    assert torch.equal(y, exact(x, w))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("m", [8, 40, 100])
def test_warpgroups_that_overtake_each_other(
    emulate: Callable[..., Tensor], m: int, descending: bool, early: bool
) -> None:
    # With 64 rows they take turns at chunks, so that one may be several ahead.
    x, w, values, codes = make(m, 64, 128 * 40, torch.bfloat16)
    y = emulate(x, values, codes, None, (64, 2, 1), early=early, descending=descending)
    assert torch.equal(y, exact(x, w))


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("layout", [(0, 0, 0), (64, 2, 2), (128, 1, 1), (256, 2, 4)])
@BOTH_KERNELS
def test_weights_that_share_a_call(
    emulate_group: Callable[..., list[Tensor]],
    device: tuple[int, int, int],
    layout: tuple[int, int, int],
    m: int,
) -> None:
    rows = (144, 65, 16, 300)  # none of them whole tiles
    x, operands, expected = None, [], []
    for n in rows:
        own_x, w, values, codes = make(m, n, 64 * 9, torch.bfloat16)
        x = own_x if x is None else x
        bias = torch.randint(-9, 10, (n,)).bfloat16() if n % 2 == 0 else None
        operands.append((values, codes, bias))
        expected.append(exact(x, w, bias))
    results = emulate_group(x, operands, layout, device=device)
    for y, right in zip(results, expected, strict=True):
        assert torch.equal(y, right)
    with pytest.raises(AssertionError, match="1 to 4 weights"):
        emulate_group(x, operands + operands[:1], layout, device=device)


@pytest.mark.parametrize("descending", [False, True])
@BOTH_KERNELS
def test_sums_wait_for_the_products_of_all(
    emulate: Callable[..., Tensor], device: tuple[int, int, int], descending: bool
) -> None:
    # One chunk, and sums of 64 tokens that need more memory than what some warps are done with.
    x, w, values, codes = make(64, 128, 128, torch.bfloat16)
    y = emulate(x, values, codes, None, (128, 1, 1), descending=descending, device=device)
    assert torch.equal(y, exact(x, w))


@pytest.mark.parametrize("m", [1, 64])
def test_gpus_with_less_shared_memory(emulate: Callable[..., Tensor], m: int) -> None:
    x, w, values, codes = make(m, 64, 64 * 7, torch.float16)
    y = emulate(x, values, codes, None, (64, 1, 1), device=ADA)
    assert torch.equal(y, exact(x, w))


@pytest.mark.parametrize(("n", "k"), [(16, 64), (16, 128), (1024, 64), (48, 576)])
def test_small_weights(emulate: Callable[..., Tensor], n: int, k: int) -> None:
    x, w, values, codes = make(5, n, k, torch.bfloat16)
    assert torch.equal(emulate(x, values, codes), exact(x, w))


def test_groups_with_fewer_than_two_entries(emulate: Callable[..., Tensor]) -> None:
    x, w, _, _ = make(4, 64, 256, torch.bfloat16)
    w[::3] = 0
    w[:, 5::4] = 0
    assert torch.equal(emulate(x, *pack(w)), exact(x, w))


def test_rows_of_a_wider_tensor(emulate: Callable[..., Tensor]) -> None:
    x, w, values, codes = make(6, 64, 256, torch.bfloat16)
    wide = torch.full((6, 264), torch.nan, dtype=x.dtype)
    wide[:, :256] = x
    assert torch.equal(emulate(wide[:, :256], values, codes), exact(x, w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_float32_sums(
    emulate: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    w = ops.project_2to4(torch.randn(64, 1024).to(dtype))
    x = torch.randn(16, 1024).to(dtype)
    expected = x.double() @ w.double().T
    error = (emulate(x, *pack(w)).double() - expected).norm() / expected.norm()
    rounding = (expected.to(dtype).double() - expected).norm() / expected.norm()
    assert error < 1.1 * rounding


@pytest.mark.parametrize(
    ("m", "k", "message"),
    [(65, 64, "1 to 64 tokens"), (4, 96, "multiple of 64")],
)
def test_refuses_what_it_cannot(
    emulate: Callable[..., Tensor], m: int, k: int, message: str
) -> None:
    x, _, values, codes = make(m, 16, k, torch.bfloat16)
    with pytest.raises(AssertionError, match=message):
        emulate(x, values, codes, device=BLACKWELL)


def test_the_limit_is_the_same_everywhere() -> None:
    root = Path(__file__).parents[1]
    header = (root / "csrc/cuda/sparse_linear_decode.h").read_text(encoding="utf-8")
    stand_in = (root / "kernels/sparse_linear_decode.py").read_text(encoding="utf-8")
    assert f"kMaxDecodeTokens = {ops.MAX_DECODE_TOKENS}," in header
    assert f"MAX_TOKENS = {ops.MAX_DECODE_TOKENS}\n" in stand_in


def test_operands_reach_the_kernel_in_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = pytest.importorskip("proxsparse.backends.cuda", reason="the extension was not built")
    executors = pytest.importorskip("proxsparse.backends.executors")
    if not backend._cuda.has_kernels:
        pytest.skip("the extension was built without its CUDA kernels")
    for module in (backend, executors):
        monkeypatch.setattr(module, "current_stream", lambda _: 0)
    x, _, values, codes = make(3, 48, 96, torch.bfloat16)
    _, _, *others = make(3, 80, 96, torch.bfloat16)
    said = r"W \[48, 96\]{} and 3 tokens: in_features must be a multiple of 64"
    with pytest.raises(RuntimeError, match=said.format("")):
        executors.Decode((0, 0, 0), 0, torch.bfloat16, 48, 96)(x, values, codes, None)
    with pytest.raises(RuntimeError, match=said.format(r", \[80, 96\]")):
        backend._decode_together(x, [(values, codes, None), (*others, None)])


def test_a_weight_is_read_early_only_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = pytest.importorskip("proxsparse.backends.cuda", reason="the extension was not built")
    executors = pytest.importorskip("proxsparse.backends.executors")
    early = []
    fake = SimpleNamespace(Decode=lambda *_: lambda *operands: early.append(operands[-2]))
    monkeypatch.setattr(executors, "_cuda", fake)
    monkeypatch.setattr(executors, "current_stream", lambda _: 0)
    run = executors.Decode((0, 0, 0), 0, torch.bfloat16, 64, 64)
    monkeypatch.setattr(backend, "find_run", lambda *_: run)
    x, w, values, codes = make(3, 64, 64, torch.bfloat16)
    shifted = torch.empty(values.numel() + 1, dtype=values.dtype)[1:].view_as(values)
    shifted.copy_(values)
    rows = ops.pack_2to4(w)[1]
    for forms, expected in (((values, codes), True), ((values, rows), False),
                            ((shifted, codes), False)):  # fmt: skip
        run(x, *forms, None)
        assert early.pop() is expected
        # Copies in a group would not outlive the making of its operands.
        assert backend._share_a_launch(x, [(*forms, None)] * 2) is expected


def test_hopper_refuses_more_than_it_was_made_for(emulate: Callable[..., Tensor]) -> None:
    x, _, values, codes = make(257, 16, 64, torch.bfloat16)
    with pytest.raises(AssertionError, match="1 to 256 tokens"):
        emulate(x, values, codes)


@pytest.mark.sparse_tc
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1040, 1088), (16, 64), (4096, 14336)])
def test_every_layout_on_a_gpu(n: int, k: int, dtype: torch.dtype) -> None:
    backend = pytest.importorskip("proxsparse.backends.cuda")
    executors = pytest.importorskip("proxsparse.backends.executors")
    if not backend._cuda.has_kernels:
        pytest.fail("the extension was built without its CUDA kernels")
    hopper = torch.cuda.get_device_capability()[0] == 9
    for m in (1, 7, 16, 17, 33, 64, *((65, 128, 250) if hopper else ())):
        x, w, values, codes = (t.cuda() for t in make(m, n, k, dtype))
        bias = torch.randint(-9, 10, (n,), device="cuda").to(dtype)
        expected = exact(x, w, bias)
        for layout in ((0, 0, 0), *executors.DECODE_LAYOUTS):
            if layout[2] > 1 and torch.cuda.get_device_capability() < (9, 0):
                continue
            run = executors.Decode(layout, 0, dtype, n, k)
            torch.full((m, n), torch.nan, dtype=dtype, device="cuda")  # poisons what run reuses
            assert torch.equal(run(x, values, codes, bias), expected), layout


@pytest.mark.sparse_tc
@pytest.mark.parametrize("m", [1, 16, 64])
def test_a_group_gives_what_its_products_give(m: int) -> None:
    backend = pytest.importorskip("proxsparse.backends.cuda")
    x, operands, expected = None, [], []
    for n in (4096, 1024, 1024, 272, 14336):
        own_x, w, values, codes = (t.cuda() for t in make(m, n, 4096, torch.bfloat16))
        x = own_x if x is None else x
        bias = torch.randint(-9, 10, (n,), device="cuda").bfloat16() if n > 1024 else None
        operands.append((values, codes, bias, None, None))
        expected.append(exact(x, w, bias))
    assert backend._share_a_launch(x, operands)
    results = ops.sparse_linear_group(x, *zip(*operands, strict=True))
    for y, right in zip(results, expected, strict=True):
        assert torch.equal(y, right)


@pytest.mark.sparse_tc
def test_the_op_runs_on_the_kernel_and_repeats_bitwise() -> None:
    w = ops.project_2to4(torch.randn(4096, 4096, device="cuda").bfloat16())
    x = torch.randn(3, 4, 4096, device="cuda").bfloat16()
    values, codes = ops.pack_2to4(w)
    y = ops.sparse_linear_decode(x, values, codes)
    expected = x.double() @ w.double().T
    dense = (x @ w.T).double()
    assert (y.double() - expected).norm() <= 1.1 * (dense - expected).norm()
    assert all(torch.equal(y, ops.sparse_linear_decode(x, values, codes)) for _ in range(20))


@pytest.mark.sparse_tc
def test_a_captured_graph_replays_with_new_tokens() -> None:
    x, w, values, codes = (t.cuda() for t in make(8, 512, 1024, torch.bfloat16))
    ops.sparse_linear(x, values, codes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.sparse_linear(x, values, codes)
    x.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(y, exact(x, w))
