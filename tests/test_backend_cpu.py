"""The C++ kernels against the float64 reference: every op, dtype, odd size and special value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.errors import ProxsparseError
from proxsparse.ops import dispatch, reference

backend_cpu = pytest.importorskip("proxsparse.backends.cpu", reason="the extension was not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half a unit in the last place of each dtype, relative.
HALF_ULP = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}
SHAPES = ((0, 8), (1, 4), (3, 20), (5, 132), (2, 3, 260))
STEP = {"step": 7, "lr": 0.02, "lam": 0.3, "grad_scale": 0.7}


@pytest.fixture(autouse=True)
def on_the_cpu_backend():
    with dispatch.use_backend("cpu"):
        yield


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def objective(w: Tensor, z: Tensor, lam: float) -> Tensor:
    w, z = w.double(), z.double()
    distance = (w - z).square().reshape(-1, 4).sum(-1) / 2
    return distance + lam * reference.regularizer_2to4(w).reshape(-1)


def assert_prox(w: Tensor, z: Tensor, lam: float, rounding: float) -> None:
    """w's objective is within rounding of the float64 optimum, measured in units of |z|^2/2."""
    best = objective(reference.prox_2to4(z.double(), lam), z, lam)
    size = z.double().square().reshape(-1, 4).sum(-1) / 2
    excess = (objective(w, z, lam) - best - rounding * size).amax()
    assert excess <= 0, f"lam {lam:g}: objective too high by {excess:g}"


def near_equal(jitter: float) -> Callable[[int], Tensor]:
    return lambda seed: 1 + jitter * randn(4000, 4, seed=seed)


def with_tie(position: int) -> Callable[[int], Tensor]:
    def family(seed: int) -> Tensor:
        z = randn(4000, 4, seed=seed).abs()
        z[:, position] = z[:, position - 1]
        return z

    return family


def corner(seed: int) -> Tensor:
    """One large entry and three small ones almost equal: the dense Hessian is nearly singular."""
    large = randn(4000, 1, seed=seed).abs().clamp_max(1)
    small = (1.2 - large).clamp_min(0.01) * randn(4000, 1, seed=seed + 1).abs() / 3
    return torch.cat((large, small * (1 + 1e-3 * randn(4000, 3, seed=seed + 2))), 1)


FAMILIES = {
    "normal": lambda seed: randn(8000, 4, seed=seed),
    "spread": lambda seed: (3 * randn(4000, 4, seed=seed)).exp(),
    "zeros": lambda seed: randn(4000, 4, seed=seed) * (randn(4000, 4, seed=seed + 1) > 0),
    "equal": near_equal(0.0),
    "equal 1e-6": near_equal(1e-6),
    "equal 1e-3": near_equal(1e-3),
    "equal 0.05": near_equal(0.05),
    "tie 1 2": with_tie(1),
    "tie 3 4": with_tie(3),
    "corner": corner,
}
LAMBDAS = (1e-4, 0.005, 0.05, 0.3, 0.5, 0.7, 0.8, 0.877, 0.95, 1.0, 1.1, 1.2, 1.25, 2.0, 40.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_prox_reaches_the_float64_objective(family: str) -> None:
    z = FAMILIES[family](3)
    for lam in LAMBDAS:
        # What comparing two objectives in float32 can lose.
        assert_prox(ops.prox_2to4(z, lam), z, lam, rounding=2**-23)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prox_dtypes_and_shapes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    z = randn(*shape, dtype=dtype)
    w = ops.prox_2to4(z, 0.4)
    assert w.dtype == dtype and w.shape == z.shape
    if z.numel():
        # Rounding the result moves w by half an ulp and the objective, flat there, by its square;
        # rounding a zero-crossing entry costs the first order.
        assert_prox(w, z, 0.4, 2**-23 + 4 * HALF_ULP[dtype])
    exact = ops.prox_2to4(z.float(), 0.4)
    assert torch.equal(w, exact.to(dtype)), "a low dtype must be the float32 result, rounded"


def test_prox_of_nothing_is_the_identity() -> None:
    z = torch.cat((randn(50, 8), torch.zeros(1, 8), 1e-30 * randn(1, 8), 1e30 * randn(1, 8)))
    assert torch.equal(ops.prox_2to4(z, 0.0), z)


def test_prox_large_lam_keeps_two_bitwise() -> None:
    z = randn(500, 16)
    assert torch.equal(ops.prox_2to4(z, 1e6), reference.project_2to4(z))


def test_prox_ties_keep_the_lower_index() -> None:
    z = torch.tensor([[5.0, -5, 5, 5], [1, 0, 2, -1], [3, 3, 4, 4], [0, 0, 0, 0]])
    expected = torch.tensor([[5.0, -5, 0, 0], [1, 0, 2, 0], [0, 0, 4, 4], [0, 0, 0, 0]])
    w = ops.prox_2to4(z, 10.0)
    assert torch.equal(w, expected)
    assert not (w.signbit() & (w == 0)).any(), "-0.0"


def test_prox_nan_stays_in_its_group() -> None:
    z = randn(9, 16)
    z[4, 6] = torch.nan
    w = ops.prox_2to4(z, 0.3)
    bad = torch.zeros_like(z, dtype=torch.bool)
    bad[4, 4:8] = True
    assert torch.equal(w.isnan(), bad)
    assert torch.equal(w[~bad], ops.prox_2to4(z.nan_to_num(0.0), 0.3)[~bad])


def test_prox_infinity_is_kept() -> None:
    z = torch.tensor([[torch.inf, 2.0, -1.0, 0.5], [1.0, -torch.inf, torch.inf, 3.0]])
    assert torch.equal(ops.prox_2to4(z, 0.3), reference.project_2to4(z))


@pytest.mark.parametrize("op", ["prox_adamw_", "gate_update_", "project_2to4", "pack_2to4"])
def test_thread_count_and_repetition_change_nothing(op: str) -> None:
    def outputs(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        s, g, m, w0 = (randn(301, 260, seed=seed) for seed in range(4))
        if op == "prox_adamw_":
            v = m.square()
            ops.prox_adamw_(s, g, m, v, **STEP)
            return [s, m, v]
        if op == "gate_update_":
            s, v = s.abs().clamp_max(1), m.square()
            ops.gate_update_(s, g, w0, m, v, randn(260, seed=9).abs(), **STEP)
            return [s, m, v]
        if op == "project_2to4":
            return [ops.project_2to4(s)]
        return list(ops.pack_2to4(ops.project_2to4(s)))

    before = torch.get_num_threads()
    try:
        first = outputs(1)
        for threads in (1, 2, 3):
            assert all(map(torch.equal, first, outputs(threads)))
    finally:
        torch.set_num_threads(before)


# -- exact ops: bitwise the reference
# ---------------------------------------------------------------


def special(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal values with ties, both zeros, infinities and NaN among them."""
    x = (2 * randn(*shape)).round() / 2
    pick = torch.randint(0, 12, shape, generator=torch.Generator().manual_seed(1))
    for index, value in enumerate((0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan)):
        x = torch.where(pick == index, value, x)
    return x.to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mask_and_projection_are_bitwise(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    w = special(shape, dtype)
    assert torch.equal(ops.mask_2to4(w), reference.mask_2to4(w))
    assert torch.equal(bits(ops.project_2to4(w)), bits(reference.project_2to4(w)))
    for score_dtype in (*DTYPES, torch.float64):
        score = special(shape, torch.float64).roll(1).to(score_dtype) + 2**-20
        expected = reference.project_2to4(w, score)
        assert torch.equal(bits(ops.project_2to4(w, score)), bits(expected)), score_dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_and_unpack_are_bitwise(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    w = reference.project_2to4(special(shape, dtype))
    w[..., :4] = torch.tensor([0, 0, 0, 3]).to(dtype)  # fewer than two non-zeros
    values, codes = ops.pack_2to4(w)
    expected_values, expected_codes = reference.pack_2to4(w)
    assert torch.equal(bits(values), bits(expected_values))
    assert torch.equal(codes, expected_codes)
    unpacked = reference.unpack_2to4(values, codes)
    assert torch.equal(bits(ops.unpack_2to4(values, codes)), bits(unpacked))
    assert torch.equal(unpacked.nan_to_num(7), w.nan_to_num(7))


def test_is_2to4() -> None:
    w = reference.project_2to4(randn(40, 36))
    assert ops.is_2to4(w)
    assert ops.is_2to4(w.new_empty(0, 4))
    for value in (1e-40, torch.nan, -1.0):
        broken = w.clone()
        broken[39, 32:] = torch.tensor([1.0, value, 0.0, 1.0])
        assert not ops.is_2to4(broken), value
    w[0, :4] = torch.tensor([-0.0, 1, -0.0, 2])
    assert ops.is_2to4(w), "-0.0 is a zero"


def test_pack_names_the_first_group_that_is_not_2to4() -> None:
    w = reference.project_2to4(randn(5, 8))
    w[3, 4:] = 1.0
    with pytest.raises(ProxsparseError, match="row 3, columns 4 to 7"):
        ops.pack_2to4(w)


# -- fused updates
# ----------------------------------------------------------------------------------


def in_float64(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in tensors.items()}


@pytest.mark.parametrize("weights", [*DTYPES])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lam2", [0.0, 0.05])
def test_prox_adamw(weights: torch.dtype, states: torch.dtype, lam2: float) -> None:
    shape = (7, 132)
    exact = {
        "p": randn(*shape, dtype=weights, seed=1),
        "grad": randn(*shape, dtype=weights, seed=2),
        "m": randn(*shape, dtype=states, seed=3),
        "v": randn(*shape, dtype=states, seed=4).square(),
    }
    w0 = randn(*shape, dtype=weights, seed=5)
    run = {name: x.clone() for name, x in exact.items()}
    settings = {**STEP, "lam2": lam2, "reg_eps": 0.5, "weight_decay": 0.1}
    ops.prox_adamw_(*run.values(), w0=w0, **settings)
    exact = in_float64(exact)
    with dispatch.use_backend("reference"):
        ops.prox_adamw_(*exact.values(), w0=w0.double(), **settings)
        # The weights as AdamW leaves them, before the prox.
        moved = {
            k: x.clone() for k, x in in_float64({"p": randn(*shape, dtype=weights, seed=1)}).items()
        }
        grads = [randn(*shape, dtype=weights, seed=2), randn(*shape, dtype=states, seed=3)]
        grads.append(randn(*shape, dtype=states, seed=4).square())
        ops.prox_adamw_(
            moved["p"], *(x.double() for x in grads), w0=w0.double(), **{**settings, "lam": 0.0}
        )
    for name in ("m", "v"):
        low = 2 * HALF_ULP.get(states, 2**-24)
        torch.testing.assert_close(run[name].double(), exact[name], rtol=low + 1e-6, atol=1e-6)
    assert_prox(run["p"], moved["p"], STEP["lam"], 1e-6 + 4 * HALF_ULP[weights])
    assert ops.is_2to4(run["p"]).item() is False, "lam is small enough for dense groups"


def test_prox_adamw_padding_of_a_tail_tile_is_not_used() -> None:
    # reg_eps 0 makes the regulariser of a zero weight 0/0: only real elements may be NaN.
    p, grad, m, w0 = (randn(1, 4, seed=seed) for seed in range(4))
    v = torch.ones_like(m)
    ops.prox_adamw_(p, grad, m, v, w0=w0, lam2=0.1, reg_eps=0.0, **STEP)
    assert p.isfinite().all() and m.isfinite().all() and v.isfinite().all()


@pytest.mark.parametrize("weights", [*DTYPES])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 20), (3, 5, 12), (2, 4, 132)])
def test_gate_update(weights: torch.dtype, states: torch.dtype, shape: tuple[int, ...]) -> None:
    s = randn(*shape, seed=1).abs().clamp_max(1).to(states)
    grad, w0 = randn(*shape, dtype=weights, seed=2), randn(*shape, dtype=weights, seed=3)
    m, v = randn(*shape, dtype=states, seed=4), randn(*shape, dtype=states, seed=5).square()
    norms = randn(*shape[:-2], shape[-1], seed=6).abs() + 0.1
    norms[..., 3] = 0.0
    out = torch.full_like(w0, torch.nan)
    exact = in_float64({"s": s, "grad": grad, "w0": w0, "m": m, "v": v, "act_norm": norms})
    moved = {name: x.clone() for name, x in exact.items()}
    with dispatch.use_backend("reference"):
        ops.gate_update_(*exact.values(), **STEP)
        ops.gate_update_(*moved.values(), **{**STEP, "lam": 0.0})
    ops.gate_update_(s, grad, w0, m, v, norms, out=out, **STEP)
    rounding = 2 * HALF_ULP[states]
    torch.testing.assert_close(m.double(), exact["m"], rtol=rounding + 1e-6, atol=1e-6)
    torch.testing.assert_close(v.double(), exact["v"], rtol=rounding + 1e-6, atol=1e-6)
    assert torch.equal(bits(out), bits((w0.float() * s.float()).to(weights)))
    assert s.min() >= 0 and s.max() <= 1
    # In the metric of the prior the gates solve the prox; clipping to 1 only lowers rounding.
    prior = reference.gate_prior(w0.double(), norms.double())
    assert_prox(prior * s.double(), prior * moved["s"], STEP["lam"], 1e-6 + 2 * rounding)


def test_gate_update_expert_norms_are_not_mixed() -> None:
    shape = (3, 2, 8)
    s, m, v = torch.ones(shape), torch.zeros(shape), torch.zeros(shape)
    grad, w0 = torch.zeros(shape), torch.ones(shape)
    norms = torch.zeros(3, 8)
    for expert in range(3):
        norms[expert, [expert, expert + 1, 4 + expert, 5 + expert]] = 1.0
    ops.gate_update_(s, grad, w0, m, v, norms, step=1, lr=0.1, lam=50.0)
    for expert in range(3):
        assert torch.equal(s[expert] > 0, (norms[expert] > 0).expand(2, 8)), expert


def test_a_scalar_may_be_a_tensor() -> None:
    z = randn(4, 16)
    assert torch.equal(ops.prox_2to4(z, torch.tensor(0.3)), ops.prox_2to4(z, 0.3))


def test_float64_is_refused_by_name() -> None:
    with pytest.raises(ProxsparseError, match=r"cannot run prox_2to4: its dtype is torch\.float64"):
        ops.prox_2to4(randn(2, 8).double(), 0.3)
