"""The seam: which backend runs an op, and what PyTorch is told about it."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.errors import ProxsparseError
from proxsparse.ops import dispatch, reference, schemas

# Values that ranking and zeroing must treat alike everywhere.
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-40, 2.0, -2.0)


@pytest.fixture(
    params=["reference", "cpu", pytest.param("triton", marks=pytest.mark.gpu)],
)
def backend(request: pytest.FixtureRequest) -> str:
    found = dispatch.implementation("prox_2to4", request.param)
    if isinstance(found, str):
        pytest.skip(found)
    name: str = request.param
    return name


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    """Lets a test see the first look-up of an implementation, and the first log of a reason."""
    for cached in (dispatch.implementation, dispatch._log_once):
        cached.cache_clear()
    yield
    for cached in (dispatch.implementation, dispatch._log_once):
        cached.cache_clear()


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" else "cpu"


def tensor_scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def schema_args(op: str, device: str = "cpu", shape: tuple[int, ...] = (6, 20)) -> tuple[Any, ...]:
    """Arguments for `torch.ops.proxsparse.<op>`, in the order of its schema."""
    generator = torch.Generator().manual_seed(0)
    w, grad, w0 = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    scalars = tuple(tensor_scalar(x) for x in (3.0, 0.1, 0.2, 0.5))
    sparse = reference.project_2to4(w)
    m, v = 0.1 * grad, 0.1 * grad.square()
    return {
        "prox_2to4": (w, tensor_scalar(0.3)),
        "project_2to4": (w, grad),
        "mask_2to4": (w,),
        "is_2to4": (sparse,),
        "pack_2to4": (sparse,),
        "unpack_2to4": reference.pack_2to4(sparse),
        "prox_adamw_": (w, grad, m, v, *scalars, w0, 0.1, 0.1, 0.9, 0.99, 1e-8, 0.1),
        "gate_update_": (
            *(w.abs().clamp_max(1), grad, w0, m, v, w0[0].abs(), *scalars, 0.9, 0.99, 1e-8),
            *(torch.zeros_like(w), False, None, 0),
        ),
        "gate_project_": (w.abs().clamp_max(1), w0, w0[0].abs(), torch.zeros_like(w)),
        "sparse_linear": (grad, *reference.pack_2to4(sparse), w[:, 0].clone(), None, None),
        "sparse_linear_decode": (
            *(grad[:, :16], *reference.pack_2to4(sparse[:, :16]), w[:, 0].clone()),
        ),
        "sparse_linear_group": (
            *(grad, *([form] * 2 for form in reference.pack_2to4(sparse))),
            *([w[:, 0].clone(), None], [None] * 2, [None, sparse]),
        ),
        "quantize_fp8": (w, None),
        "sparse_linear_fp8": (grad, *packed_fp8(sparse), w[:, 0].clone(), None),
    }[op]


def packed_fp8(sparse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, scale = reference.quantize_fp8(sparse)
    return *reference.pack_2to4(values), scale


PRODUCTS = {"sparse_linear", "sparse_linear_decode", "sparse_linear_fp8", "sparse_linear_group"}
# compress_2to4 makes a form that only a library defines; tests/test_backend_cuda.py has its tests.
PORTABLE = tuple(op for op in schemas.OPS if op != "compress_2to4")


def outcome(op: str, args: tuple[Any, ...]) -> list[Tensor]:
    """What the op returns and what it leaves in its operands."""
    args = tuple(x.clone() if isinstance(x, Tensor) else x for x in args)
    result = getattr(torch.ops.proxsparse, op)(*args)
    returned = result if isinstance(result, (tuple, list)) else (result,)
    return [x for x in (*returned, *args) if isinstance(x, Tensor)]


def expect_to_lack(op: str, backend: str) -> None:
    """Not every backend has every op, and those it should have are tested by name: no skip."""
    if dispatch.implementation(op, backend) == f"{backend} has no {op}":
        pytest.xfail(f"{backend} has no {op}")


def test_every_backend_has_the_ops_it_should(backend: str) -> None:
    lacking = {op for op in schemas.OPS if isinstance(dispatch.implementation(op, backend), str)}
    expected = {
        "reference": {"compress_2to4"},
        "cpu": {"compress_2to4", "quantize_fp8", *PRODUCTS},
        "triton": {"compress_2to4", *PRODUCTS - {"sparse_linear_decode"}},
    }
    assert lacking == expected[backend]


@pytest.mark.parametrize("op", PORTABLE)
def test_every_backend_agrees_with_the_reference(backend: str, op: str) -> None:
    expect_to_lack(op, backend)
    args = schema_args(op, device_of(backend))
    with dispatch.use_backend("reference"):
        expected = outcome(op, args)
    with dispatch.use_backend(backend):
        actual = outcome(op, args)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        if a.dtype == ops.FP8:
            a, e = a.float(), e.float()
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_ops_agree_bitwise_on_special_values(backend: str, dtype: torch.dtype) -> None:
    groups = torch.cartesian_prod(*[torch.tensor(SPECIAL)] * 4).to(device_of(backend), dtype)
    results: list[list[Tensor]] = []
    for name in ("reference", backend):
        with dispatch.use_backend(name):
            mask, projected = ops.mask_2to4(groups), ops.project_2to4(groups)
            values, codes = ops.pack_2to4(projected)
            results.append([mask, projected, values, codes, ops.unpack_2to4(values, codes)])
            assert ops.is_2to4(projected) and not ops.is_2to4(groups)
    for a, e in zip(results[1], results[0], strict=True):
        assert torch.equal(a.view(torch.uint8), e.view(torch.uint8))


@pytest.mark.parametrize("op", PORTABLE)
def test_opcheck(op: str) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    tests.append("test_aot_dispatch_dynamic")
    if op == "sparse_linear_fp8":
        tests.remove("test_schema")  # it compares operands, which PyTorch cannot in 8-bit floats
    torch.library.opcheck(
        getattr(torch.ops.proxsparse, op).default, schema_args(op), test_utils=tests
    )


W = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def _prox_adamw(w: Tensor) -> Tensor:
    p, m, v = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
    ops.prox_adamw_(p, w, m, v, step=1, lr=0.1, lam=0.1, w0=w, lam2=0.1, reg_eps=0.1)
    return p + m + v


def _gate_update(w: Tensor) -> Tensor:
    s, m, v = torch.ones_like(w), torch.zeros_like(w), torch.zeros_like(w)
    out = torch.empty_like(w)
    ops.gate_update_(s, w, w, m, v, w[0].abs(), step=1, lr=0.1, lam=0.1, out=out)
    return s + m + v + out


def _gate_project(w: Tensor) -> Tensor:
    out = torch.empty_like(w)
    ops.gate_project_(w.abs().clamp_max(1), w, w[0].abs(), out)
    return 2 * out


COMPILED: dict[str, Callable[[Tensor], Any]] = {
    "prox_2to4": lambda w: 2 * ops.prox_2to4(2 * w, 0.3),
    "project_2to4": lambda w: 2 * ops.project_2to4(2 * w),
    "mask_2to4": lambda w: ops.mask_2to4(2 * w).logical_not(),
    "is_2to4": lambda w: ops.is_2to4(2 * w).logical_not(),
    "pack_2to4": lambda w: ops.pack_2to4(2 * ops.project_2to4(w)),
    "unpack_2to4": lambda w: 2 * ops.unpack_2to4(*ops.pack_2to4(ops.project_2to4(w))),
    "prox_adamw_": _prox_adamw,
    "gate_update_": _gate_update,
    "gate_project_": _gate_project,
    "sparse_linear": lambda w: ops.sparse_linear(2 * w, *ops.pack_2to4(ops.project_2to4(w))),
    "sparse_linear_decode": lambda w: ops.sparse_linear_decode(
        2 * w, *ops.pack_2to4(ops.project_2to4(w))
    ),
    "sparse_linear_group": lambda w: ops.sparse_linear_group(
        2 * w, *([form] * 2 for form in ops.pack_2to4(ops.project_2to4(w))), *([[None] * 2] * 3)
    )[1],
    "quantize_fp8": lambda w: 2 * ops.quantize_fp8(2 * w)[0].float(),
    "sparse_linear_fp8": lambda w: ops.sparse_linear_fp8(2 * w, *_pack_fp8(ops.project_2to4(w))),
}


def _pack_fp8(sparse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, scale = ops.quantize_fp8(sparse)
    return *ops.pack_2to4(values), scale


@pytest.mark.parametrize("op", PORTABLE)
def test_compiles_without_a_graph_break(op: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(COMPILED[op], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(W), COMPILED[op](W), rtol=0, atol=0)


def test_the_table_of_ops_is_what_is_registered() -> None:
    registered = {
        name.removeprefix("proxsparse::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("proxsparse::")
    }
    assert registered == set(schemas.OPS)


@pytest.mark.parametrize("op", schemas.OPS)
def test_every_implementation_takes_the_arguments_of_the_schema(op: str, backend: str) -> None:
    expect_to_lack(op, backend)
    schema = getattr(torch.ops.proxsparse, op).default._schema
    function = dispatch.implementation(op, backend)
    assert not isinstance(function, str), function
    names = [argument.name for argument in schema.arguments]
    assert list(inspect.signature(function).parameters)[: len(names)] == names
    assert callable(getattr(ops, op))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "unknown backend 'gpu': choose one of reference, cpu, cuda, triton"),
        ("", "unknown backend ''"),
    ],
)
def test_unknown_backend(name: str, message: str) -> None:
    with pytest.raises(ProxsparseError, match=message), dispatch.use_backend(name):
        pass


@pytest.mark.parametrize(
    ("name", "w", "reason"),
    [
        ("triton", W, "its tensors are on cpu"),
        ("cpu", W.double(), "its dtype is torch.float64"),
        ("cpu", W.to("meta"), "its tensors are on meta"),
    ],
    ids=["triton_on_cpu", "float64", "meta"],
)
def test_a_backend_asked_for_never_falls_back(name: str, w: Tensor, reason: str) -> None:
    message = f"backend '{name}' was asked for, but cannot run mask_2to4: {reason}"
    with dispatch.use_backend(name), pytest.raises(ProxsparseError, match=message):
        dispatch.choose("mask_2to4", w)


def test_use_backend_nests_and_ends_with_its_block() -> None:
    with contextlib.suppress(RuntimeError), dispatch.use_backend("triton"):
        with dispatch.use_backend("reference"):
            assert dispatch.choose("mask_2to4", W) is reference.mask_2to4
        raise RuntimeError
    ops.mask_2to4(W)  # triton would refuse


def test_automatic_choice_takes_the_fast_backend(backend: str) -> None:
    if backend != "reference":
        w = W.to(device_of(backend))
        assert dispatch.choose("mask_2to4", w) is dispatch.implementation("mask_2to4", backend)


@pytest.mark.usefixtures("fresh_caches")
def test_float64_falls_back_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    w = W.double()
    with caplog.at_level(logging.INFO, logger="proxsparse"):
        for _ in range(3):
            assert torch.equal(ops.project_2to4(w), reference.project_2to4(w))
    assert [record.getMessage() for record in caplog.records] == [
        "project_2to4 runs on the reference backend: its dtype is torch.float64"
    ]


@pytest.mark.usefixtures("fresh_caches")
def test_without_the_extension_the_reference_runs_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> None:
        raise ImportError("no compiler was found")

    monkeypatch.setattr("importlib.import_module", missing)
    with caplog.at_level(logging.INFO, logger="proxsparse"):
        assert torch.equal(ops.mask_2to4(W), reference.mask_2to4(W))
    message = "mask_2to4 runs on the reference backend: no compiler was found"
    assert [record.getMessage() for record in caplog.records] == [message]
    forced = "backend 'cpu' was asked for, but cannot run mask_2to4: no compiler was found"
    with dispatch.use_backend("cpu"), pytest.raises(ProxsparseError, match=forced):
        ops.mask_2to4(W)


@pytest.mark.usefixtures("fresh_caches")
def test_an_op_that_a_backend_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: contextlib)
    assert dispatch.implementation("mask_2to4", "cpu") == "cpu has no mask_2to4"
