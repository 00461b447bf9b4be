"""The weight under the mask of the gates: the definition, and agreement with the step's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from proxsparse.errors import ProxsparseError
from proxsparse.ops import gate_project_, gate_update_, reference
from proxsparse.ops.dispatch import implementation, use_backend

BACKENDS = ["reference", "cpu", pytest.param("triton", marks=pytest.mark.gpu)]


def make_problem(shape: tuple[int, ...], device: str) -> tuple[torch.Tensor, ...]:
    w0 = torch.randn(shape, device=device)
    w0[..., :1, :4] = 0
    s = torch.rand(shape, device=device)
    s[..., :2] = 1  # ties keep the lower index
    return s, w0, torch.rand(*shape[:-2], shape[-1], device=device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 4), (5, 20), (3, 7, 132), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_w0_under_the_top_two_scores(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if isinstance(found := implementation("gate_project_", backend), str):
        pytest.skip(found)
    s, w0, act_norm = make_problem(shape, "cuda" if backend == "triton" else "cpu")
    w0 = w0.to(dtype)
    out = torch.full_like(w0, math.nan)
    with use_backend(backend):
        gate_project_(s, w0, act_norm, out)
    mask = reference.mask_2to4(reference.gate_score(w0.double(), s.double(), act_norm.double()))
    assert torch.equal(out, torch.where(mask, w0, 0.0))
    assert not out[~mask].signbit().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_what_the_step_writes(backend: str) -> None:
    """A weight made again from the gates is the one that the step would have stored."""
    if isinstance(found := implementation("gate_project_", backend), str):
        pytest.skip(found)
    s, w0, act_norm = make_problem((64, 516), "cuda" if backend == "triton" else "cpu")
    m, v, grad = torch.zeros_like(s), torch.zeros_like(s), torch.randn_like(s)
    stored, made = torch.empty_like(w0), torch.empty_like(w0)
    with use_backend(backend):
        for step in range(1, 4):
            settings: dict[str, Any] = {"step": step, "lr": 0.1, "lam": 0.1}
            gate_update_(s, grad, w0, m, v, act_norm, **settings, out=stored, hard=True)
            gate_project_(s, w0, act_norm, made)
            assert torch.equal(made, stored)


def test_8_bit_gates_are_multiples_of_one_255th() -> None:
    s, w0, act_norm = make_problem((8, 32), "cpu")
    codes = (s * 255).to(torch.uint8)
    out, expected = torch.empty_like(w0), torch.empty_like(w0)
    gate_project_(codes, w0, act_norm, out)
    gate_project_(codes.float() / 255, w0, act_norm, expected)
    assert torch.equal(out, expected)


S = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"s": S.long()}, r"s has dtype torch.int64: a floating dtype is needed"),
        ({"w0": torch.ones(8, 4)}, r"w0 is \[8, 4\] on cpu, but s is \[4, 8\]"),
        ({"act_norm": torch.ones(4)}, r"act_norm is \[4\]; gates \[4, 8\] need one norm"),
        ({"out": torch.ones(8, 4).T}, "out is updated in place and must be contiguous"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"s": S, "w0": S, "act_norm": torch.ones(8), "out": S.clone()}
    with pytest.raises(ProxsparseError, match=message):
        gate_project_(**{**call, **changes})
