"""The exact proximal operator: float64 decides.

The reference solves each group by Newton steps. Here its objective is held against the best that a
slow and simple method finds: coordinate descent, run to convergence from many starts on three and
on four entries, and the 2-sparse candidate. Fast backends are then held against the reference.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proxsparse.errors import ProxsparseError
from proxsparse.ops import project_2to4, prox_2to4, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAMBDAS = tuple(10 ** (-4 + 5 * i / 24) for i in range(25))  # 1e-4 ... 10, for groups of sigma 1
MAX_SWEEPS = 3000


def objective(w: Tensor, z: Tensor, lam: float | Tensor) -> Tensor:
    """1/2 ||w - z||^2 + lam*R(w) of each group, in float64: [G, 4] -> [G]."""
    w, z = w.double(), z.double()
    a, b, c, d = w.abs().unbind(-1)
    penalty = a * b * c + b * c * d + c * d * a + d * a * b
    return ((w - z) ** 2).sum(-1) / 2 + lam * penalty


def descend(start: Tensor, z: Tensor, lam: float, entries: int) -> Tensor:
    """Coordinate descent to convergence on the first `entries` of each group; [4, G] throughout.

    A minimiser keeps the order and sign of z >= 0, so its smallest entries are the ones left out.
    """
    w = start.clone()
    w[entries:] = 0
    active = torch.arange(z.shape[1])
    moving, target = w.clone(), z
    for sweep in range(1, MAX_SWEEPS + 1):
        before = moving.clone()
        for i in range(entries):
            x, y, u = (moving[j] for j in range(4) if j != i)
            moving[i] = (target[i] - lam * (x * y + u * (x + y))).clamp_min_(0)
        if sweep % 10 == 0:
            still = ((moving - before).abs() > 1e-15 * target[0]).any(0)
            w[:, active] = moving
            active, moving, target = active[still], moving[:, still], target[:, still]
            if not active.numel():
                break
    w[:, active] = moving
    return w


def best_objective(magnitudes: Tensor, lam: float, seed: int) -> Tensor:
    """The lowest objective found for sorted groups of magnitudes [G, 4]; [G]."""
    generator = torch.Generator().manual_seed(seed)
    z = magnitudes.T.contiguous()
    two_sparse = z.clone()
    two_sparse[2:] = 0
    best = objective(two_sparse.T, magnitudes, lam)
    for entries in (3, 4):
        random = torch.rand(3, *z.shape, generator=generator, dtype=z.dtype)
        for share in (torch.ones_like(z), torch.full_like(z, 0.4), *random):
            w = descend(share * z, z, lam, entries)
            best = torch.minimum(best, objective(w.T, magnitudes, lam))
    return best


def check_optimal(z: Tensor, lam: float, seed: int = 0) -> None:
    """The claim: never above the best found by more than 1e-9 relative."""
    magnitudes = z.abs().sort(-1, descending=True).values
    best = best_objective(magnitudes, lam, seed)
    excess = objective(reference.prox_2to4(z, lam), z, lam) - best
    worst = int((excess - 1e-9 * best).argmax())
    assert excess[worst] <= 1e-9 * best[worst], f"{z[worst].tolist()} at lam {lam}"


@pytest.mark.parametrize(
    "num_groups", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)], ids=str
)
def test_never_above_brute_force_on_random_groups(num_groups: int) -> None:
    for i, lam in enumerate(LAMBDAS):
        for start in range(0, num_groups // len(LAMBDAS), 20_000):
            size = min(20_000, num_groups // len(LAMBDAS) - start)
            check_optimal(torch.randn(size, 4, dtype=torch.float64), lam, seed=1000 * i + start)


def family(name: str, size: int) -> Tensor:
    """Groups [size, 4] on which a solver for lam = 1 may stumble."""
    base = 1.2 * torch.rand(size, 1, dtype=torch.float64)
    free = torch.rand(size, 4, dtype=torch.float64)
    spread = 10 ** (-6 * torch.rand(size, 1, dtype=torch.float64))
    if name == "near_equal":
        return base * (1 + torch.randn(size, 4, dtype=torch.float64) * spread)
    if name == "equal":
        return base.expand(size, 4).clone()
    if name == "equal_pairs":
        return torch.cat([base, base, free[:, :1], free[:, :1]], 1)
    if name == "one_large":
        return torch.cat([base, base * spread * free[:, :3]], 1)
    if name == "uniform":
        return 1.3 * free
    if name == "powers":
        return 10 ** (-3 * free)
    if name == "zeros":
        return free * (torch.rand(size, 4) > 0.3)
    # Where the 3-sparse minimum appears: z3 = z1*z2 on the unit circle, and just beside it.
    angle = base / 1.2 * math.pi / 2
    third = angle.cos() * angle.sin()
    beside = third * (1 + 0.01 * torch.randn(size, 1, dtype=torch.float64))
    return torch.cat([angle.cos(), angle.sin(), beside, third * free[:, :1]], 1)


@pytest.mark.parametrize("size", [1500, pytest.param(40_000, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "near_equal",
        "equal",
        "equal_pairs",
        "one_large",
        "uniform",
        "powers",
        "zeros",
        "transition",
    ],
)
def test_never_above_brute_force_on_adversarial_groups(name: str, size: int) -> None:
    check_optimal(family(name, size), lam=1.0)


@pytest.mark.parametrize(
    ("group", "lam"),
    [
        ([1.5087445974, 0.8729918003, -0.8619441986, 0.8821051717], 0.5),
        ([0.2075455934, 0.2132893999, 0.2056997269, 0.2053102404], 3.8311868),
    ],
)
def test_groups_on_which_a_worse_start_of_newton_cycles(group: list[float], lam: float) -> None:
    z = torch.tensor([group], dtype=torch.float64)
    check_optimal(z, lam)
    low = reference.prox_2to4(z.float(), lam)
    expected = objective(reference.prox_2to4(z, lam), z, lam)
    assert objective(low, z, lam) <= expected * (1 + 1e-6)


def test_fast_backends_reach_the_objective_of_the_reference(place: dict[str, Any]) -> None:
    """Within the rounding of the result's dtype, which costs its square: a minimum is flat."""
    dtype = place["dtype"]
    families = [family(n, 500) for n in ("near_equal", "uniform", "powers", "zeros", "transition")]
    for lam in LAMBDAS:
        z = torch.cat([torch.randn(2000, 4), *families]).to(**place)
        out = prox_2to4(z, lam)
        assert out.dtype == dtype and out.shape == z.shape
        norm = z.double().square().sum(-1)
        rounding = torch.finfo(dtype).eps ** 2 * norm * (1 + lam * norm.sqrt())
        expected = objective(reference.prox_2to4(z.double(), lam), z, lam)
        excess = objective(out, z, lam) - expected * (1 + 1e-5) - 4 * rounding
        worst = int(excess.argmax())
        assert excess[worst] <= 0, f"{z[worst].tolist()} at lam {lam}"


def test_lam_zero_is_the_identity_bitwise(place: dict[str, Any]) -> None:
    z = torch.randn(64, 16).to(**place)
    assert torch.equal(prox_2to4(z, 0.0), z)


def test_large_lam_is_the_projection(place: dict[str, Any]) -> None:
    z = torch.randn(64, 16).to(**place)
    out = prox_2to4(z, 1e6)
    assert torch.equal(out, project_2to4(z))
    assert not out[out == 0].signbit().any()


@pytest.mark.parametrize("lam", [0.01, 0.5, 10.0])
def test_sign_and_order_are_those_of_z(place: dict[str, Any], lam: float) -> None:
    z = torch.randn(2000, 4).to(**place)
    w = prox_2to4(z, lam)
    assert ((w == 0) | (w.sign() == z.sign())).all()
    assert (w.abs() <= z.abs()).all()
    ordered = w.abs().gather(-1, z.abs().sort(dim=-1, descending=True, stable=True).indices)
    slack = torch.finfo(z.dtype).eps * z.abs().amax(-1, keepdim=True)
    assert (ordered.diff() <= slack).all()
    assert not w[w == 0].signbit().any()


@pytest.mark.parametrize("lam", [0.0, 1e-3, 1.0, 100.0])
def test_two_sparse_groups_are_fixed_points(place: dict[str, Any], lam: float) -> None:
    z = project_2to4(torch.randn(500, 8).to(**place))
    z[:2] = 0
    z[:, ::4] *= torch.rand(500, 2, device=z.device) > 0.5  # many with one entry, or none
    assert torch.equal(prox_2to4(z, lam), z)


def test_one_entry_near_the_transition_is_a_fixed_point(place: dict[str, Any]) -> None:
    z = torch.zeros(1200, 4).to(**place)
    z[:, 2] = torch.linspace(0.3, 1.5, 1200)  # of lam: a dense minimum ends at w1 + w2 = 1
    assert torch.equal(prox_2to4(z, 1.0), z)


def test_ties_keep_the_lower_index(place: dict[str, Any]) -> None:
    z = torch.tensor([[1, -1, 1, 1], [1, 2, -1, 1], [0, 1, 1, 1]]).to(**place)
    assert prox_2to4(z, 100.0).tolist() == [[1, -1, 0, 0], [1, 2, 0, 0], [0, 1, 1, 0]]


def test_nan_fills_its_group_only(place: dict[str, Any]) -> None:
    z = torch.randn(5, 12).to(**place)
    clean = prox_2to4(z, 0.3)
    z[2, 5] = math.nan
    out = prox_2to4(z, 0.3)
    assert out[2, 4:8].isnan().all()
    out[2, 4:8] = clean[2, 4:8]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("shape", [(4,), (3, 8), (2, 3, 20), (5, 1028), (0,), (0, 8), (3, 0)])
def test_shape_does_not_change_a_group(place: dict[str, Any], shape: tuple[int, ...]) -> None:
    z = torch.randn(shape).to(**place)
    out = prox_2to4(z, 0.4)
    assert out.shape == z.shape and out.dtype == z.dtype
    assert torch.equal(out, prox_2to4(z.reshape(-1, 4), 0.4).reshape(shape))


def test_non_contiguous_and_tensor_lam(place: dict[str, Any]) -> None:
    z = torch.randn(16, 12).to(**place).T
    lam = torch.tensor(0.25, device=z.device)
    assert torch.equal(prox_2to4(z, lam), prox_2to4(z.contiguous(), 0.25))


DISTINCT = st.lists(st.integers(1, 10**6), min_size=4, max_size=4, unique=True)
SIGNS = st.lists(st.sampled_from([-1, 1]), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(DISTINCT, st.permutations(range(4)), SIGNS, st.floats(1e-4, 10))
def test_permutations_and_signs_commute_with_it(
    group: list[int], order: list[int], signs: list[int], lam: float
) -> None:
    z = torch.tensor(group, dtype=torch.float64) / 5e5
    sign = torch.tensor(signs)
    moved = reference.prox_2to4((z * sign)[order], lam)
    assert torch.equal(moved, (reference.prox_2to4(z, lam) * sign)[order])


@pytest.mark.parametrize("exponent", [-30, -3, 5, 40])
def test_only_lam_times_scale_matters(exponent: int) -> None:
    z, c = torch.randn(2000, 4, dtype=torch.float64), 2.0**exponent  # exact in floating point
    for lam in LAMBDAS[::6]:
        assert torch.equal(reference.prox_2to4(c * z, lam / c), c * reference.prox_2to4(z, lam))


@pytest.mark.parametrize(
    ("z", "lam", "message"),
    [
        (torch.ones(4), -0.1, r"lam is -0\.1: it must be at least 0"),
        (torch.ones(4), math.nan, r"lam is nan: it must be at least 0"),
        (torch.ones(4), torch.ones(1), r"lam must be a float or a 0-d tensor, not \[1\]"),
        (
            torch.ones(2, 6),
            0.1,
            r"z has shape \[2, 6\]: the last dimension must be a multiple of 4",
        ),
        (torch.tensor(1.0), 0.1, r"z has shape \[\]: the last dimension"),
        (torch.ones(4, dtype=torch.int64), 0.1, r"z has dtype torch.int64: a floating dtype"),
    ],
    ids=["negative", "nan", "one_d_lam", "six_columns", "scalar", "integer"],
)
def test_bad_input(z: Tensor, lam: float | Tensor, message: str) -> None:
    with pytest.raises(ProxsparseError, match=message):
        prox_2to4(z, lam)
