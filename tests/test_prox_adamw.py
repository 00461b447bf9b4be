"""AdamW and the proximal step on weights, against torch's own AdamW followed by the prox."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from proxsparse.errors import ProxsparseError
from proxsparse.ops import prox_2to4, prox_adamw_, reference

# Of one update, relative to the size of the weights: fused kernels use approximate reciprocals.
DTYPES = (torch.float32,)  # of `place`, beside float64 on the reference
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}
STEPS = 5


def states(p: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(p), torch.zeros_like(p)


def assert_near(actual: Tensor, expected: Tensor, slack: float = 0.0) -> None:
    tolerance = TOLERANCES[actual.dtype] + slack
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(4,), (3, 20), (2, 3, 1028)])
@pytest.mark.parametrize("lam", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_is_adamw_then_prox(
    place: dict[str, Any], shape: tuple[int, ...], lam: float, weight_decay: float
) -> None:
    p = torch.randn(shape, **place)
    m, v = states(p)
    expected = p.clone().requires_grad_()
    betas, eps = (0.8, 0.95), 1e-6
    # Where a minimum is about to appear, the prox moves with the square root of a rounding error.
    slack = 0.0 if lam == 0 else torch.finfo(p.dtype).eps ** 0.5
    adamw = torch.optim.AdamW(
        [expected], lr=0.02, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False
    )
    for step in range(1, STEPS + 1):
        expected.grad = torch.randn_like(expected)
        p.copy_(expected.detach())
        prox_adamw_(
            *(p, expected.grad, m, v),
            step=step,
            lr=0.02,
            lam=lam,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        adamw.step()
        with torch.no_grad():
            expected.copy_(prox_2to4(expected, lam))
        assert_near(p, expected.detach(), slack)
        assert_near(m, adamw.state[expected]["exp_avg"])
        assert_near(v, adamw.state[expected]["exp_avg_sq"])


def test_groups_become_2_sparse_under_a_large_lam(place: dict[str, Any]) -> None:
    p = torch.randn(8, 16, **place)
    prox_adamw_(p, torch.randn_like(p), *states(p), step=1, lr=0.01, lam=1e5)
    assert ((p.reshape(-1, 4) != 0).sum(-1) <= 2).all()
    assert not p[p == 0].signbit().any()


@pytest.mark.parametrize("reg_eps", [1e-3, 0.1])
def test_frozen_regularizer_grad_is_the_gradient(reg_eps: float) -> None:
    w0 = torch.randn(64, dtype=torch.float64)
    w0[:3] = torch.tensor([0.0, -0.0, 1e-8])
    p = (w0 + 0.3 * torch.randn(64, dtype=torch.float64)).requires_grad_()
    sign = torch.tensor([-1.0 if x < 0 else 1.0 for x in w0.tolist()], dtype=torch.float64)
    loss = (p / (w0 + reg_eps * sign) * (p - w0)).square().sum()
    (grad,) = torch.autograd.grad(loss, p)
    torch.testing.assert_close(
        reference.frozen_regularizer_grad(p.detach(), w0, reg_eps), grad, rtol=1e-12, atol=1e-12
    )


def test_grad_scale_and_frozen_regularizer_enter_the_gradient(place: dict[str, Any]) -> None:
    w0 = torch.randn(6, 12, **place)
    p, grad = w0 + 0.1 * torch.randn_like(w0), torch.randn_like(w0)
    total = 0.25 * grad + 0.3 * reference.frozen_regularizer_grad(p, w0, 0.1)
    fused, plain = p.clone(), p.clone()
    fused_states, plain_states = states(p), states(p)
    settings: dict[str, Any] = {"step": 1, "lr": 0.01, "lam": 0.02}
    prox_adamw_(
        *(fused, grad, *fused_states),
        **settings,
        grad_scale=0.25,
        w0=w0,
        lam2=0.3,
        reg_eps=0.1,
    )
    prox_adamw_(plain, total, *plain_states, **settings)
    for actual, expected in zip((fused, *fused_states), (plain, *plain_states), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_with_float32_states(
    place: dict[str, Any], dtype: torch.dtype
) -> None:
    """The arithmetic is that of float32; only the result is rounded."""
    if place["dtype"] == torch.float64:
        place = {**place, "dtype": torch.float32}
    exact = torch.randn(4, 64, **place).to(dtype).float()
    grad = torch.randn_like(exact).to(dtype)
    low = exact.to(dtype)
    exact_states, low_states = states(exact), states(exact)
    for step in (1, 2):
        exact = low.float()
        prox_adamw_(exact, grad.float(), *exact_states, step=step, lr=0.01, lam=0.05)
        prox_adamw_(low, grad, *low_states, step=step, lr=0.01, lam=0.05)
        assert low.dtype == dtype and low_states[0].dtype == torch.float32
        assert_near(low_states[0], exact_states[0])
        assert_near(low_states[1], exact_states[1])
        torch.testing.assert_close(
            low.float(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps / 8
        )


def test_bfloat16_states_stay_bfloat16(place: dict[str, Any]) -> None:
    p = torch.randn(4, 64, **place)
    m, v = (torch.zeros_like(p, dtype=torch.bfloat16) for _ in range(2))
    full = p.clone()
    full_states = states(p)
    grad = torch.randn_like(p)
    prox_adamw_(p, grad, m, v, step=1, lr=0.01, lam=0.05)
    prox_adamw_(full, grad, *full_states, step=1, lr=0.01, lam=0.05)
    assert_near(p, full)  # the states are rounded after they were used
    assert m.dtype == v.dtype == torch.bfloat16
    for low, exact in zip((m, v), full_states, strict=True):
        torch.testing.assert_close(low, exact.to(torch.bfloat16), rtol=0.01, atol=0)


def test_tensor_scalars_equal_floats(place: dict[str, Any]) -> None:
    p = torch.randn(4, 32, **place)
    grad = torch.randn_like(p)
    scalars: dict[str, Any] = {
        "step": 3.0,
        "lr": 0.125,
        "lam": 0.0625,
        "grad_scale": 0.5,
    }  # exact in float32
    tensors: dict[str, Any] = {n: torch.tensor(x, device=p.device) for n, x in scalars.items()}
    by_float, by_tensor = p.clone(), p.clone()
    float_states, tensor_states = states(p), states(p)
    prox_adamw_(by_float, grad, *float_states, **scalars)
    prox_adamw_(
        *(by_tensor, grad, *tensor_states),
        **tensors,
    )
    for a, b in zip((by_float, *float_states), (by_tensor, *tensor_states), strict=True):
        assert torch.equal(a, b)


def test_empty(place: dict[str, Any]) -> None:
    p = torch.empty(0, 8, **place)
    prox_adamw_(p, p.clone(), *states(p), step=1, lr=0.1, lam=0.1)


W = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": torch.ones(4, 4)}, r"grad is \[4, 4\] on cpu, but p is \[4, 8\] on cpu"),
        ({"m": torch.ones(8, 4)}, r"m is \[8, 4\] on cpu, but p is \[4, 8\]"),
        ({"v": torch.ones(32)}, r"v is \[32\] on cpu, but p is \[4, 8\]"),
        ({"p": torch.ones(8, 4).T}, r"p is updated in place and must be contiguous.*\(1, 4\)"),
        ({"m": torch.ones(8, 4).T}, "m is updated in place and must be contiguous"),
        ({"v": torch.ones(8, 4).T}, "v is updated in place and must be contiguous"),
        ({"p": W.long()}, r"p has dtype torch.int64: a floating dtype is needed"),
        ({"p": torch.ones(4, 6)}, r"p has shape \[4, 6\]: the last dimension must be a multiple"),
        ({"lam2": 0.1}, r"lam2 is 0\.1, so the original weight w0 is needed"),
        ({"lam2": 0.1, "w0": torch.ones(8)}, r"w0 is \[8\] on cpu, but p is \[4, 8\]"),
        ({"step": 0}, r"step is 0: it must be at least 1"),
        ({"lr": math.nan}, r"lr is nan: it must be at least 0"),
        ({"lam": -1.0}, r"lam is -1\.0: it must be at least 0"),
        ({"grad_scale": torch.ones(2)}, r"grad_scale must be a float or a 0-d tensor, not \[2\]"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_input_changes_nothing(changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"p": W.clone(), "grad": W, "m": W * 0, "v": W * 0}
    call |= {"step": 1, "lr": 0.1, "lam": 0.1} | changes
    before = {name: call[name].clone() for name in ("p", "m", "v")}
    with pytest.raises(ProxsparseError, match=message):
        prox_adamw_(**call)
    for name, x in before.items():
        assert torch.equal(call[name], x)
