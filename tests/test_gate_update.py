"""The step on gates, against the method written out group by group in Python floats."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from proxsparse.errors import ProxsparseError
from proxsparse.ops import gate_update_
from proxsparse.ops.reference import mask_2to4, prox_2to4

DTYPES = (torch.float32,)  # of `place`, beside float64 on the reference
TOLERANCES = {torch.float64: 1e-11, torch.float32: 5e-6}
BETAS, EPS = (0.9, 0.999), 1e-8


def literal_prior(w0: Tensor, act_norm: Tensor) -> Tensor:
    """(|W0_ik| ||X_k||)^1.5, normalised to RMS 1 in each group of four, floor 1e-3; [N, K]."""
    prior = torch.empty_like(w0)
    for i, group in itertools.product(range(w0.shape[0]), range(w0.shape[1] // 4)):
        columns = range(4 * group, 4 * group + 4)
        a = [(abs(float(w0[i, k])) * float(act_norm[k])) ** 1.5 for k in columns]
        rms = math.sqrt(sum(x * x for x in a) / 4)
        for k, x in zip(columns, a, strict=True):
            prior[i, k] = max(x / rms if rms else 0.0, 1e-3)
    return prior


class LiteralGates:
    """The update of one matrix, in float64, with torch's own Adam."""

    def __init__(self, s: Tensor, w0: Tensor, act_norm: Tensor, lr: float) -> None:
        self.w0 = w0.double().cpu()
        self.prior = literal_prior(self.w0, act_norm.double().cpu())
        self.s = s.to("cpu", torch.float64, copy=True).requires_grad_()
        self.adam = torch.optim.Adam([self.s], lr=lr, betas=BETAS, eps=EPS)

    def step(self, weight_grad: Tensor, lam: float) -> None:
        self.s.grad = weight_grad.double().cpu() * self.w0
        self.adam.step()
        with torch.no_grad():
            scaled = self.prior * self.s.clip(0, 1)
            self.s.copy_((prox_2to4(scaled, lam) / self.prior).clip(0, 1))


def make_problem(place: dict[str, Any], *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gates at 1, weights with dead entries and one dead group, input norms with a dead feature."""
    w0 = 0.02 * torch.randn(shape, **place)
    w0[..., 0, :4] = 0
    w0[..., 1, 2] = 0
    act_norm = 5 * torch.rand(*shape[:-2], shape[-1], **place)
    act_norm[..., -1] = 0
    return torch.ones_like(w0), w0, act_norm


def states(s: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(s), torch.zeros_like(s)


def near(actual: Tensor, expected: Tensor, slack: float = 0.0) -> None:
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(
        actual.double().cpu(), expected, rtol=tolerance, atol=tolerance + slack
    )


@pytest.mark.parametrize("shape", [(2, 4), (5, 20), (3, 132)])
@pytest.mark.parametrize("lam", [0.0, 0.05, 0.4])
def test_is_the_method_written_out(
    place: dict[str, Any], shape: tuple[int, ...], lam: float
) -> None:
    s, w0, act_norm = make_problem(place, *shape)
    m, v = states(s)
    out = torch.full_like(w0, math.nan)
    literal = LiteralGates(s, w0, act_norm, lr=0.1)
    # Where a minimum is about to appear, the prox moves with the square root of a rounding error.
    slack = torch.finfo(s.dtype).eps ** 0.5 if lam else 0.0
    prior = literal.prior.to(s)
    for step in range(1, 5):
        grad = torch.randn_like(w0)
        s.copy_(literal.s.detach())
        gate_update_(s, grad, w0, m, v, act_norm, step=step, lr=0.1, lam=lam, out=out)
        literal.step(grad, lam)
        near(prior * s, literal.prior * literal.s.detach(), slack)
        assert torch.equal(out, w0 * s)
    state = literal.adam.state[literal.s]
    near(m, state["exp_avg"])
    near(v, state["exp_avg_sq"])


def test_hard_out_is_the_weight_under_the_mask_of_the_moment(place: dict[str, Any]) -> None:
    s, w0, act_norm = make_problem(place, 6, 36)
    s.uniform_()
    soft = s.clone()
    out = torch.full_like(w0, math.nan)
    grad = torch.randn_like(w0)
    settings: dict[str, Any] = {"step": 1, "lr": 0.1, "lam": 0.1}
    gate_update_(s, grad, w0, *states(s), act_norm, **settings, out=out, hard=True)
    gate_update_(soft, grad, w0, *states(s), act_norm, **settings)
    assert torch.equal(s, soft)  # the gates themselves move alike
    prior = literal_prior(w0.double().cpu(), act_norm.double().cpu())
    mask = mask_2to4(prior * s.double().cpu()).to(w0.device)
    assert torch.equal(out, torch.where(mask, w0, 0.0))
    assert not out[~mask].signbit().any()


def test_experts_are_separate_matrices(place: dict[str, Any]) -> None:
    s, w0, act_norm = make_problem(place, 3, 5, 12)
    s.uniform_()
    m, v = states(s)
    grad, out = torch.randn_like(w0), torch.empty_like(w0)
    one_by_one = [x.clone() for x in (s, m, v, out)]
    settings: dict[str, Any] = {"step": 1, "lr": 0.1, "lam": 0.3}
    gate_update_(s, grad, w0, m, v, act_norm, **settings, out=out)
    for e in range(3):
        es, em, ev, eo = (x[e] for x in one_by_one)
        gate_update_(es, grad[e], w0[e], em, ev, act_norm[e], **settings, out=eo)
    for together, separate in zip((s, m, v, out), one_by_one, strict=True):
        assert torch.equal(together, separate)


def test_only_the_ratio_of_the_norms_within_a_group_matters(place: dict[str, Any]) -> None:
    s, w0, act_norm = make_problem(place, 4, 16)
    s.uniform_()
    other = s.clone()
    grad = torch.randn_like(w0)
    units = torch.tensor([0.5, 4.0, 64.0, 2.0], **place).repeat_interleave(4)
    for gates, norms in ((s, act_norm), (other, act_norm * units)):
        gate_update_(gates, grad, w0, *states(s), norms, step=1, lr=0.1, lam=0.3)
    near(other, s.double().cpu())


def test_grad_scale_multiplies_the_gradient(place: dict[str, Any]) -> None:
    s, w0, act_norm = make_problem(place, 4, 16)
    other = s.clone()
    grad = torch.randn_like(w0)
    scaled, plain = states(s), states(s)
    gate_update_(s, grad, w0, *scaled, act_norm, step=1, lr=0.1, lam=0.1, grad_scale=0.25)
    gate_update_(other, 0.25 * grad, w0, *plain, act_norm, step=1, lr=0.1, lam=0.1)
    for a, b in zip((s, *scaled), (other, *plain), strict=True):
        near(a, b.double().cpu())


def test_gates_stay_in_the_unit_interval_and_end_2to4(place: dict[str, Any]) -> None:
    s, w0, act_norm = make_problem(place, 8, 32)
    m, v = states(s)
    steps = 60
    for step in range(1, steps + 1):
        grad = torch.randn_like(w0)
        gate_update_(s, grad, w0, m, v, act_norm, step=step, lr=0.1, lam=1e4 * step / steps)
        assert ((s >= 0) & (s <= 1)).all()
        assert not s.signbit().any()
    alive = w0.reshape(-1, 4).ne(0).any(-1)  # a group of zeros has no gradient and all but no prior
    assert ((s.reshape(-1, 4) != 0).sum(-1) <= 2)[alive].all()


def test_a_group_of_zero_weights_moves_by_the_prox_alone(place: dict[str, Any]) -> None:
    w0 = torch.zeros(1, 4, **place)
    s = torch.ones_like(w0)
    gate_update_(
        *(s, torch.randn_like(w0), w0, *states(s), torch.ones(4, **place)),
        step=1,
        lr=0.1,
        lam=1.0,
    )
    near(s, (prox_2to4(torch.full((1, 4), 1e-3, dtype=torch.float64), 1.0) * 1e3))
    assert 0.99 < float(s.min()) < 1


def test_bfloat16_gates_and_out(place: dict[str, Any]) -> None:
    """The arithmetic is that of float32; `out` is made of the rounded gates."""
    if place["dtype"] == torch.float64:
        place = {**place, "dtype": torch.float32}
    exact, w0, act_norm = make_problem(place, 8, 32)
    w0 = w0.bfloat16()
    s, out = exact.bfloat16(), torch.full_like(w0, math.nan)
    m, v = states(s)
    grad = torch.randn_like(w0)
    gate_update_(s, grad, w0, m, v, act_norm, step=1, lr=0.1, lam=0.2, out=out)
    gate_update_(
        *(exact, grad.float(), w0.float(), *states(exact), act_norm), step=1, lr=0.1, lam=0.2
    )
    assert s.dtype == m.dtype == v.dtype == out.dtype == torch.bfloat16
    torch.testing.assert_close(s.float(), exact, rtol=2**-8, atol=1e-3)
    assert torch.equal(out, w0 * s)


def test_tensor_scalars_equal_floats(place: dict[str, Any]) -> None:
    s, w0, act_norm = make_problem(place, 4, 16)
    other = s.clone()
    grad = torch.randn_like(w0)
    scalars: dict[str, Any] = {
        "step": 3.0,
        "lr": 0.125,
        "lam": 0.0625,
        "grad_scale": 0.5,
    }  # exact in float32
    tensors: dict[str, Any] = {
        name: torch.tensor(x, device=s.device) for name, x in scalars.items()
    }
    by_float, by_tensor = states(s), states(s)
    gate_update_(s, grad, w0, *by_float, act_norm, **scalars)
    gate_update_(
        *(other, grad, w0, *by_tensor, act_norm),
        **tensors,
    )
    for a, b in zip((s, *by_float), (other, *by_tensor), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 3, 8)])
def test_empty(place: dict[str, Any], shape: tuple[int, ...]) -> None:
    s = torch.empty(shape, **place)
    act_norm = torch.empty(*shape[:-2], shape[-1], **place)
    gate_update_(s, s.clone(), s.clone(), *states(s), act_norm, step=1, lr=0.1, lam=0.1)


def test_8_bit_states_take_the_step_of_floats_and_round_without_bias() -> None:
    """Each code is one of the two around its value; the mean over draws is the value."""
    w0, act_norm = torch.randn(3, 172), 0.1 + torch.rand(172)
    grad = torch.randn_like(w0)
    s = torch.randint(0, 256, w0.shape, dtype=torch.uint8)
    m = torch.randint(-127, 128, w0.shape, dtype=torch.int8)
    v = torch.randint(1, 256, w0.shape, dtype=torch.uint8)
    scales = 1e-3 + 0.01 * torch.rand(3, 2)  # 516 elements: two blocks and a part
    block = (torch.arange(w0.numel()) // 256).view_as(w0)

    def values(s: Tensor, m: Tensor, v: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        return s.double() / 255, m * scales[block, 0].double(), v * scales[block, 1].double()

    exact = [x.clone() for x in values(s, m, v, scales)]
    exact[2].square_()
    settings: dict[str, Any] = {"step": 3, "lr": 0.1, "lam": 0.1}
    gate_update_(exact[0], grad.double(), w0.double(), *exact[1:], act_norm.double(), **settings)
    exact[2].sqrt_()
    draws = 64
    sums = [torch.zeros_like(x) for x in exact]
    for seed in range(draws):
        states, new = [x.clone() for x in (s, m, v)], scales.clone()
        gate_update_(
            *(states[0], grad, w0, *states[1:], act_norm), **settings, scales=new, seed=seed
        )
        steps = (1 / 255, new[block, 0].double(), new[block, 1].double())
        for total, value, target, step in zip(
            sums, values(*states, new), exact, steps, strict=True
        ):
            assert ((value - target).abs() <= 1.001 * step + 1e-5).all()
            total += (value - target) / step
    for total in sums:  # a draw deviates by at most half a step (v, kept off 0, a little more)
        assert abs(total.mean() / draws) <= 6 * 0.5 / math.sqrt(draws * total.numel()) + 2e-3


def test_8_bit_rounding_is_reproducible_for_a_seed_and_a_step() -> None:
    def run(step: int, seed: int) -> list[Tensor]:
        torch.manual_seed(0)
        w0, grad = torch.randn(2, 5, 104), torch.randn(2, 5, 104)
        s = torch.full(w0.shape, 200, dtype=torch.uint8)
        m, v = torch.zeros_like(s, dtype=torch.int8), torch.zeros_like(s)
        scales, out = torch.zeros(2, 3, 2), torch.full_like(w0, math.nan)
        gate_update_(
            *(s, grad, w0, m, v, torch.ones(2, 104)), step=step, lr=0.1, lam=0.1,
            out=out, hard=True, scales=scales, seed=seed,
        )  # fmt: skip
        assert torch.equal(out.ne(0).reshape(-1, 4).sum(-1), torch.full((260,), 2))
        return [s, m, v, scales, out]

    first = run(1, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, run(1, 7), strict=True))
    assert not torch.equal(first[0], run(2, 7)[0]) and not torch.equal(first[0], run(1, 8)[0])


def test_8_bit_operands_are_checked() -> None:
    s, x = torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 8)
    m, norm = torch.zeros_like(s, dtype=torch.int8), torch.ones(8)
    settings: dict[str, Any] = {"step": 1, "lr": 0.1, "lam": 0.1}
    with pytest.raises(ProxsparseError, match=r"scales are \[2\] .* need \[1, 2\]"):
        gate_update_(s, x, x, m, s, norm, **settings, scales=torch.zeros(2))
    with pytest.raises(ProxsparseError, match=r"s, m, v must be of"):
        gate_update_(s, x, x, s, s, norm, **settings, scales=torch.zeros(1, 2))
    with pytest.raises(ProxsparseError, match=r"s has dtype torch.uint8: a floating dtype"):
        gate_update_(s, x, x, m, s, norm, **settings)


S = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_norm": torch.ones(4)}, r"act_norm is \[4\]; gates \[4, 8\] need one norm.*\[8\]"),
        ({"act_norm": torch.ones(1, 8)}, r"act_norm is \[1, 8\]; gates \[4, 8\] need one norm"),
        ({"grad": torch.ones(8, 4)}, r"grad is \[8, 4\] on cpu, but s is \[4, 8\] on cpu"),
        ({"w0": torch.ones(8)}, r"w0 is \[8\] on cpu, but s is \[4, 8\]"),
        ({"out": torch.ones(4)}, r"out is \[4\] on cpu, but s is \[4, 8\]"),
        ({"out": torch.ones(8, 4).T}, "out is updated in place and must be contiguous"),
        ({"s": torch.ones(8, 4).T}, r"s is updated in place and must be contiguous.*\(1, 4\)"),
        ({"m": torch.ones(8, 4).T}, "m is updated in place and must be contiguous"),
        ({"v": torch.ones(8, 4).T}, "v is updated in place and must be contiguous"),
        ({"s": S.long()}, r"s has dtype torch.int64: a floating dtype is needed"),
        ({"s": torch.ones(4, 6)}, r"s has shape \[4, 6\]: the last dimension must be a multiple"),
        ({"step": 0.5}, r"step is 0\.5: it must be at least 1"),
        ({"lam": math.nan}, r"lam is nan: it must be at least 0"),
        ({"lr": torch.ones(2)}, r"lr must be a float or a 0-d tensor, not \[2\]"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_input_changes_nothing(changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {
        "s": S.clone(),
        "grad": S,
        "w0": S,
        "m": S * 0,
        "v": S * 0,
        "act_norm": torch.ones(8),
    }
    call |= {"step": 1, "lr": 0.1, "lam": 0.1} | changes
    before = {name: call[name].clone() for name in ("s", "m", "v")}
    with pytest.raises(ProxsparseError, match=message):
        gate_update_(**call)
    for name, x in before.items():
        assert torch.equal(call[name], x)
