"""The Triton kernels against the float64 reference: on a GPU, or under Triton's interpreter.

The interpreter has to be chosen before triton is first imported, so test_triton_interpreter.py runs
this file in a process of its own with TRITON_INTERPRET=1. Sizes are small: the interpreter is slow.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from proxsparse.ops import reference

pytest.importorskip("triton")

from proxsparse.kernels.gate_project import gate_project_triton
from proxsparse.kernels.gate_update import gate_update_triton
from proxsparse.kernels.is_2to4 import is_2to4_triton
from proxsparse.kernels.launch import BLOCK, NUM_WARPS
from proxsparse.kernels.mask_2to4 import mask_2to4_triton
from proxsparse.kernels.pack_2to4 import pack_2to4_triton
from proxsparse.kernels.project_2to4 import project_2to4_triton
from proxsparse.kernels.prox_2to4 import _prox_2to4_kernel, prox_2to4_triton
from proxsparse.kernels.prox_adamw import prox_adamw_triton
from proxsparse.kernels.quantize_fp8 import quantize_fp8_triton
from proxsparse.kernels.sparse_linear_decode import sparse_linear_decode_triton
from proxsparse.kernels.unpack_2to4 import unpack_2to4_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    # Candidates that do not exist divide by zero and lose; NumPy mentions it.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One group, a row of an odd number of groups, 3-D, rows longer than a tile, whole tiles.
SHAPES = ((1, 4), (5, 12), (2, 3, 64), (3, 1028), (2, 1024))
# Half a unit in the last place, relative.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
BITS = {4: torch.int32, 2: torch.int16}


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """Fills what torch.empty returns with NaN, so that an entry nobody writes is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal entries, a quarter of them zero, with some ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x[torch.rand(shape, generator=generator) < 0.25] = 0
    x[torch.rand(shape, generator=generator) < 0.1] = 0.5
    return x.to(dtype).to(DEVICE)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Bitwise equality: it tells -0.0 from +0.0, and NaN equals itself."""
    bits = BITS[x.element_size()]
    return x.dtype == y.dtype and torch.equal(x.cpu().view(bits), y.cpu().view(bits))


def objective(w: Tensor, z: Tensor, lam: float) -> Tensor:
    w, z = w.double(), z.double()
    a, b, c, d = w.abs().unbind(-1)
    return ((w - z) ** 2).sum(-1) / 2 + lam * (a * b * (c + d) + c * d * (a + b))


def descend(z: Tensor, lam: float) -> Tensor:
    """Coordinate descent in float64 from z: another way to a minimum, [G, 4] of z >= 0."""
    w = z.clone()
    for _ in range(200):
        for i in range(4):
            j, k, m = (w[:, other] for other in range(4) if other != i)
            w[:, i] = (z[:, i] - lam * (j * k + k * m + m * j)).clamp_min(0)
    return w


def families() -> dict[str, Tensor]:
    """Groups in units of 1/lam, [G, 4] float32, around everything that can go wrong."""
    generator = torch.Generator().manual_seed(0)
    count = 2 * BLOCK // 4

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def spread(low: float, high: float, *shape: int) -> Tensor:
        return low * (high / low) ** uniform(*shape)

    equal = spread(0.1, 3, count, 1) * (1 + 1e-3 * normal(count, 4))
    near_equal = spread(0.3, 1.5, count, 1) * (1 + 0.1 * normal(count, 4))
    three_small = torch.cat(
        (0.5 + 0.5 * uniform(count, 1), 0.5 * uniform(count, 1).expand(-1, 3)), 1
    )
    two_small = spread(0.1, 2, count, 1).expand(-1, 4) * torch.cat(
        (torch.ones(count, 2), uniform(count, 1).expand(-1, 2)), 1
    )
    threshold = 2 * uniform(count, 4)
    threshold[:, 2] = threshold[:, 0] * threshold[:, 1] * (1 + 0.1 * normal(count))
    zeros = normal(count, 4) * (uniform(count, 4) < 0.6)
    return {
        **{f"normal {sigma}": sigma * normal(count, 4) for sigma in (1e-4, 0.005, 0.05, 0.5, 2)},
        "all scales": spread(1e-4, 40, count, 1) * normal(count, 4),
        "independent scales": spread(1e-4, 10, count, 4),
        "equal": equal,
        "near equal": near_equal,
        "three small": three_small * (1 + 1e-3 * normal(count, 4)),
        "two small": two_small,
        "threshold": threshold,
        "zeros": zeros,
    }


@pytest.mark.parametrize("lam", [1.0, 0.03])
@pytest.mark.parametrize("family", families())
def test_prox_objective_is_as_low_as_float64s(family: str, lam: float) -> None:
    z = (families()[family] / lam).to(DEVICE)
    exact = z.cpu().double()
    best = torch.minimum(
        objective(reference.prox_2to4(exact, lam), exact, lam),
        objective(descend(exact.abs(), lam).copysign(exact), exact, lam),
    )
    for steps, bound in ((3, 1e-6), (2, 4e-5)):
        w = torch.full_like(z, math.nan)
        grid = (math.ceil(z.numel() / BLOCK),)
        _prox_2to4_kernel[grid](*(z, w, lam, z.numel(), steps, 4, BLOCK), num_warps=NUM_WARPS)
        # An objective far below |z|^2 is the difference of large numbers: fp32 cannot resolve it.
        excess = objective(w.cpu(), exact, lam) - best
        allowed = bound * best + 1e-12 * exact.square().sum(-1)
        assert (excess <= allowed).all(), exact[(excess - allowed).argmax()].tolist()
        assert (w.abs() <= z.abs()).all()
        assert ((w == 0) | (w.sign() == z.sign())).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lam", [0.02, 0.4])
def test_prox_agrees_with_float64(shape: tuple[int, ...], dtype: torch.dtype, lam: float) -> None:
    z = random(shape, dtype)
    w = prox_2to4_triton(z, lam)
    exact = reference.prox_2to4(z.double(), lam)
    assert w.dtype == dtype and w.shape == z.shape
    error = (w.double() - exact).abs()
    assert (error <= 2 * ROUNDING[dtype] * exact.abs() + 2e-3 * ROUNDING[dtype] + 5e-6).all()
    assert not (w[w == 0].signbit()).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_prox_at_the_ends_of_lam(dtype: torch.dtype) -> None:
    z = random((4, 512), dtype)
    assert same_bits(prox_2to4_triton(z, 0.0), z + 0.0)
    assert same_bits(prox_2to4_triton(z, 1e6), project_2to4_triton(z))


@pytest.mark.parametrize("lam", [0.01, 1.0])
def test_prox_spreads_nan_over_its_group_only(lam: float) -> None:
    z = random((8, 32))
    clean = prox_2to4_triton(z, lam)
    for index in range(4):
        dirty = z.clone()
        dirty[index, 4 * index + index] = math.nan
        w = prox_2to4_triton(dirty, lam)
        assert w[index, 4 * index : 4 * index + 4].isnan().all()
        w[index, 4 * index : 4 * index + 4] = clean[index, 4 * index : 4 * index + 4]
        torch.testing.assert_close(w, clean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "group", [(1, 1, 1, 1), (5, 5, 7, 5), (3, 7, 5, 5), (2, 3, 3, 3), (1, 2, 1, 2), (4, 3, 4, 3)]
)
def test_ties_keep_the_lower_index(group: tuple[float, ...]) -> None:
    z = torch.tensor([group], dtype=torch.float32, device=DEVICE)
    expected = reference.project_2to4(z)
    assert torch.equal(prox_2to4_triton(z, 10.0), expected)
    assert torch.equal(project_2to4_triton(z), expected)


@pytest.mark.parametrize("lam", [0.6, 0.8, 1.2])
@pytest.mark.parametrize("group", [(0.9, 0.9, 0.5, 0.5), (0.8, 0.6, 0.6, 0.6), (0.7, 0.6, 0.6, 0)])
def test_ties_keep_the_lower_index_of_the_third_entry(group: tuple[float, ...], lam: float) -> None:
    z = torch.tensor([*itertools.permutations(group)], device=DEVICE)
    expected = reference.prox_2to4(z.double(), lam)
    torch.testing.assert_close(prox_2to4_triton(z, lam).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 8)])
def test_exact_ops_are_the_references(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = random(shape, dtype)
    w.view(-1)[::7] = -0.0
    w.view(-1)[3::11] = math.inf
    score = random(shape, torch.float32, seed=1)
    assert torch.equal(mask_2to4_triton(w), reference.mask_2to4(w))
    assert same_bits(project_2to4_triton(w, score), reference.project_2to4(w, score))
    projected = project_2to4_triton(w)
    assert same_bits(projected, reference.project_2to4(w))
    values, codes = pack_2to4_triton(projected)
    expected_values, expected_codes = reference.pack_2to4(projected)
    assert same_bits(values, expected_values) and torch.equal(codes, expected_codes)
    assert same_bits(unpack_2to4_triton(values, codes), projected)
    assert is_2to4_triton(projected)
    assert torch.equal(is_2to4_triton(w), reference.is_2to4(w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_of_every_kind_of_group(dtype: torch.dtype) -> None:
    entries = (0.0, -0.0, 1.0, -2.0, math.inf, math.nan)
    groups = [g for g in itertools.product(entries, repeat=4) if sum(x != 0 for x in g) <= 2]
    w = torch.tensor(groups, dtype=dtype, device=DEVICE).view(1, -1)
    values, codes = pack_2to4_triton(w)
    expected_values, expected_codes = reference.pack_2to4(w)
    assert same_bits(values, expected_values) and torch.equal(codes, expected_codes)


def test_nan_counts_as_the_largest() -> None:
    w = torch.tensor([[1.0, math.nan, 3.0, 2.0], [math.nan, 5.0, math.nan, 9.0]], device=DEVICE)
    assert torch.equal(mask_2to4_triton(w), reference.mask_2to4(w))
    assert same_bits(project_2to4_triton(w), reference.project_2to4(w))


@pytest.mark.parametrize("position", [0, 1023, 1024, 2047])
def test_is_2to4_sees_the_one_bad_group(position: int) -> None:
    w = torch.zeros(2048, device=DEVICE)
    group = position // 4 * 4
    w[group : group + 4] = torch.tensor([1.0, math.nan, 0.0, -1.0], device=DEVICE)
    assert not is_2to4_triton(w)
    w[group] = -0.0
    assert is_2to4_triton(w)


# Everything the update kernels read, for one step; `double` copies go to the reference.
STEP = (3.0, 0.01, 0.2, 0.5)  # step, lr, lam, grad_scale
BETAS = (0.9, 0.999, 1e-8)


def moments(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    m = (0.1 * random(shape, seed=2)).to(dtype)
    return m, (0.01 + random(shape, seed=3).square()).to(dtype)


def doubles(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.double().clone() for x in tensors]


def assert_rounded(result: Tensor, exact: Tensor, slack: float = 2e-6) -> None:
    """`result` is `exact` up to fp32 arithmetic and one rounding to its own dtype."""
    bound = (1.01 * ROUNDING[result.dtype] + 1e-6) * exact.abs() + slack
    if result.dtype == torch.float16:
        bound = bound + 2**-25
    error = (result.double() - exact).abs()
    assert (error <= bound).all(), (error - bound).max().item()


@pytest.mark.parametrize("with_w0", [False, True])
@pytest.mark.parametrize(
    "p_dtype, state_dtype",
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("shape", [(1, 4), (3, 1028)])
def test_prox_adamw(
    shape: tuple[int, ...], p_dtype: torch.dtype, state_dtype: torch.dtype, with_w0: bool
) -> None:
    p, grad = random(shape, p_dtype), random(shape, p_dtype, seed=1)
    m, v = moments(shape, state_dtype)
    w0 = random(shape, p_dtype, seed=4) if with_w0 else None
    extra = (0.3 if with_w0 else 0.0, 0.5, *BETAS, 0.1)
    exact = doubles(p, grad, m, v)
    reference.prox_adamw_(*exact, *STEP, *doubles(w0), *extra)
    prox_adamw_triton(p, grad, m, v, *STEP, w0, *extra)
    for result, expected in zip((p, m, v), (exact[0], exact[2], exact[3]), strict=True):
        assert_rounded(result, expected, slack=1e-5 if p_dtype == torch.float32 else 2e-4)
    assert not p[p == 0].signbit().any()


@pytest.mark.parametrize("step", [1.0, 2.0, 100.0, 5000.0])
def test_bias_correction_is_accurate_at_every_step(step: float) -> None:
    grad = torch.full((1, 4), 3.0, device=DEVICE)
    p, m, v = (torch.zeros(1, 4, device=DEVICE) for _ in range(3))
    exact = doubles(p, grad, m, v)
    args = (step, 0.5, 0.0, 1.0, None, 0.0, 0.0, *BETAS, 0.0)
    reference.prox_adamw_(*exact, *args)
    prox_adamw_triton(p, grad, m, v, *args)
    torch.testing.assert_close(p.double(), exact[0], rtol=3e-6, atol=0)


def test_master_weights_are_what_is_updated() -> None:
    shape = (2, 512)
    master = random(shape)
    p, grad = master.bfloat16(), random(shape, torch.bfloat16, seed=1)
    m, v = moments(shape, torch.float32)
    exact = doubles(master, grad, m, v)
    args = (*STEP, None, 0.0, 0.0, *BETAS, 0.1)
    reference.prox_adamw_(*exact, *args)
    prox_adamw_triton(p, grad, m, v, *args, master=master)
    assert_rounded(master, exact[0], slack=1e-5)
    assert same_bits(p, master.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.25, -0.75, 3e-5])
def test_stochastic_rounding_is_unbiased_and_reproducible(dtype: torch.dtype, value: float) -> None:
    shape = (4, 1024)
    grad = torch.ones(shape, dtype=dtype, device=DEVICE)
    # On its first step Adam moves by lr against the sign of the gradient: by 0.3 of the spacing.
    start = torch.tensor(value, dtype=dtype)
    spacing = 2.0 ** (math.floor(math.log2(abs(start))) - (7 if dtype == torch.bfloat16 else 10))
    spacing = max(spacing, 2**-24 if dtype == torch.float16 else 0)
    results = {}
    for step, seed in ((1.0, 7), (1.0, 7), (1.0, 8), (2.0, 7)):
        p = start.to(DEVICE).expand(shape).contiguous()
        m, v = torch.zeros(shape, device=DEVICE), torch.zeros(shape, device=DEVICE)
        scale = (1 - 0.9**step) / 0.1 / math.sqrt((1 - 0.999**step) / 0.001)
        lr = 0.3 * spacing * scale
        prox_adamw_triton(
            p, grad, m, v, step, lr, 0.0, 1.0, None, 0.0, 0.0, 0.9, 0.999, 0.0, 0.0, seed=seed
        )
        previous = results.setdefault((step, seed), p)
        assert same_bits(previous, p)
        moved = (start.double() - p.double().cpu()) / spacing
        if value > 0 or dtype == torch.bfloat16:
            assert set(moved.unique().tolist()) <= {0.0, 1.0}
        # Five standard deviations of the mean of 4096 draws of probability 0.3.
        assert abs(moved.mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / moved.numel())
    first, other_seed, other_step = results.values()
    assert not torch.equal(first, other_seed) and not torch.equal(first, other_step)


@pytest.mark.parametrize(
    "w_dtype, state_dtype, written",
    [
        (torch.float32, torch.float32, "nothing"),
        (torch.bfloat16, torch.bfloat16, "gated"),
        (torch.bfloat16, torch.float32, "gated"),
        (torch.bfloat16, torch.bfloat16, "masked"),
        (torch.float16, torch.float16, "masked"),
    ],
)
@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (2, 3, 1028), (1, 2, 512), (300, 4)])
def test_gate_update(
    shape: tuple[int, ...], w_dtype: torch.dtype, state_dtype: torch.dtype, written: str
) -> None:
    w0, grad = random(shape, w_dtype), random(shape, w_dtype, seed=1)
    s = random(shape, seed=5).abs().clamp(0, 1).to(state_dtype)
    m, v = moments(shape, state_dtype)
    act_norm = 0.1 + random((*shape[:-2], shape[-1]), seed=6).abs()
    out = None if written == "nothing" else torch.full_like(w0, math.nan)
    exact = doubles(s, grad, w0, m, v, act_norm)
    reference.gate_update_(*exact, *STEP, *BETAS)
    gate_update_triton(s, grad, w0, m, v, act_norm, *STEP, *BETAS, out, written == "masked")
    # Small priors divide the prox: fp32 errors of 1e-7 grow up to a thousandfold.
    slack = 2e-4 if state_dtype == torch.float32 else 2e-3
    assert_rounded(s, exact[0], slack=slack)
    assert_rounded(m, exact[3])
    assert_rounded(v, exact[4])
    assert ((s >= 0) & (s <= 1)).all() and not s[s == 0].signbit().any()
    if written == "gated":
        assert_rounded(out, w0.double() * s.double())
    elif written == "masked":
        score = reference.gate_score(w0.double(), s.double(), act_norm.double())
        assert same_bits(out, reference.project_2to4(w0, score))


@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (2, 3, 1028), (300, 4)])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("s_dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_gate_project(shape: tuple[int, ...], w_dtype: torch.dtype, s_dtype: torch.dtype) -> None:
    w0 = random(shape, w_dtype)
    s = random(shape, seed=5).abs().clamp(0, 1)
    s = (255 * s).to(s_dtype) if s_dtype == torch.uint8 else s.to(s_dtype)
    act_norm = 0.1 + random((*shape[:-2], shape[-1]), seed=6).abs()
    out = torch.full_like(w0, math.nan)
    gate_project_triton(s, w0, act_norm, out)
    score = reference.gate_score(w0.double(), s if s.dtype == torch.uint8 else s.double(), act_norm)
    assert same_bits(out, reference.project_2to4(w0, score))


@pytest.mark.parametrize("lam", [0.1, 3.0])
def test_gate_update_spreads_nan_over_its_group_only(lam: float) -> None:
    shape = (4, 16)
    w0, grad, act_norm = random(shape), random(shape, seed=1), random((16,), seed=6).abs()
    grad[2, 5] = math.nan
    s = torch.ones(shape, device=DEVICE)
    m, v = moments(shape, torch.float32)
    gate_update_triton(s, grad, w0, m, v, act_norm, 1.0, 0.1, lam, 1.0, *BETAS)
    assert torch.equal(s.isnan().nonzero()[:, 1].cpu(), torch.arange(4, 8))
    assert s.isnan().any(1).nonzero().tolist() == [[2]]


@pytest.mark.parametrize("shape", [(1, 4), (2, 3, 172), (3, 1028)])
def test_gate_update_with_8_bit_states(shape: tuple[int, ...]) -> None:
    n, num_draws = shape[-2] * shape[-1], 8
    num_blocks = math.ceil(n / 256)
    block = torch.arange(n, device=DEVICE) // 256
    w0, grad = random(shape), random(shape, seed=1)
    act_norm = 0.1 + random((*shape[:-2], shape[-1]), seed=6).abs()
    draws = torch.Generator().manual_seed(9)
    s = torch.randint(0, 256, shape, generator=draws, dtype=torch.uint8).to(DEVICE)
    m = torch.randint(-127, 128, shape, generator=draws, dtype=torch.int8).to(DEVICE)
    v = torch.randint(1, 256, shape, generator=draws, dtype=torch.uint8).to(DEVICE)
    scales = 1e-3 + 0.01 * torch.rand(*shape[:-2], num_blocks, 2, generator=draws)
    scales = scales.to(DEVICE)

    def values(s: Tensor, m: Tensor, v: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m_step, v_step = (x[..., block].view(shape) for x in scales.double().unbind(-1))
        return s.double() / 255, m * m_step, v * v_step

    exact_s, exact_m, root = values(s, m, v, scales)
    exact_v = root.square()
    exact_w0 = w0.double()
    reference.gate_update_(
        exact_s, grad.double(), exact_w0, exact_m, exact_v, act_norm.double(), *STEP, *BETAS
    )
    exact = (exact_s, exact_m, exact_v.sqrt())
    sums = [torch.zeros_like(x) for x in exact]
    for seed in range(num_draws):
        states = [x.clone() for x in (s, m, v, scales)]
        out = torch.full_like(w0, math.nan)
        gate_update_triton(
            states[0], grad, w0, states[1], states[2], act_norm, *STEP, *BETAS, out,
            scales=states[3], seed=seed,
        )  # fmt: skip
        result = values(*states)
        assert_rounded(out, exact_w0 * result[0])
        steps = (torch.full_like(exact_s, 1 / 255), *(
            x[..., block].view(shape) for x in states[3].double().unbind(-1)
        ))  # fmt: skip
        for total, value, target, spacing in zip(sums, result, exact, steps, strict=True):
            assert ((value - target).abs() <= 1.001 * spacing + 2e-4 * spacing.max()).all()
            total += (value - target) / spacing
    for total, name in zip(sums, "smv", strict=True):
        # Each draw deviates by at most half a step of the code (v, kept off 0, a little more).
        bound = 6 * 0.5 / math.sqrt(num_draws * total.numel())
        assert abs(total.mean() / num_draws) <= bound + (0.01 if name == "v" else 1e-3), name


def test_updates_are_deterministic() -> None:
    results = []
    for _ in range(2):
        p, grad = random((2, 1024), torch.bfloat16), random((2, 1024), torch.bfloat16, seed=1)
        m, v = moments((2, 1024), torch.bfloat16)
        prox_adamw_triton(p, grad, m, v, *STEP, None, 0.0, 0.0, *BETAS, 0.1)
        results.append((p, m, v))
    assert all(same_bits(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.gpu
def test_scalars_on_the_device_are_read_when_the_graph_is_replayed() -> None:
    def tensors() -> tuple[Tensor, ...]:
        return random((4, 1024)), random((4, 1024), seed=1), *moments((4, 1024), torch.float32)

    scalars = [torch.tensor(x, device="cuda") for x in STEP]
    args = (None, 0.0, 0.0, *BETAS, 0.1)
    captured = tensors()
    prox_adamw_triton(*tensors(), *scalars, *args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prox_adamw_triton(*captured, *scalars, *args)
    for step, lr, lam, scale in (STEP, (4.0, 0.02, 0.1, 1.0)):
        expected = tuple(x.clone() for x in captured)
        prox_adamw_triton(*expected, step, lr, lam, scale, *args)
        for scalar, value in zip(scalars, (step, lr, lam, scale), strict=True):
            scalar.fill_(value)
        graph.replay()
        assert all(same_bits(x, y) for x, y in zip(captured, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_beyond_two_to_the_31() -> None:
    w = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    tail = random((4096,), torch.bfloat16)
    w[-4096:] = tail
    assert not is_2to4_triton(w)
    projected = project_2to4_triton(w)
    assert torch.equal(projected[-4096:], reference.project_2to4(tail))
    assert not projected[:-4096].any()
    values, codes = pack_2to4_triton(projected)
    assert torch.equal(unpack_2to4_triton(values, codes)[-4096:], projected[-4096:])
    assert torch.equal(prox_2to4_triton(w, 0.3)[-4096:], prox_2to4_triton(tail, 0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 2, 17, 64])
@pytest.mark.parametrize(("n", "k"), [(20, 24), (48, 328)])
def test_sparse_linear_decode(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """Small whole numbers: every sum is exact in float32, whatever its order."""
    w = torch.randint(-4, 5, (n, k)).to(dtype)
    w = reference.project_2to4(w, torch.rand(n, k))
    x, bias = torch.randint(-3, 4, (m, k)).to(dtype), torch.randint(-3, 4, (n,)).to(dtype)
    values, codes = reference.pack_2to4(w)
    operands = [t.to(DEVICE) for t in (x, values, codes, bias)]
    y = sparse_linear_decode_triton(*operands)
    exact = x.double() @ w.double().T
    assert torch.equal(y.cpu(), (exact + bias.double()).to(dtype))
    assert torch.equal(sparse_linear_decode_triton(*operands[:3]).cpu(), exact.to(dtype))


def test_sparse_linear_decode_refuses_what_it_cannot() -> None:
    x = torch.zeros(1, 12, device=DEVICE, dtype=torch.bfloat16)
    values, codes = reference.pack_2to4(torch.zeros(4, 12, device=DEVICE, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="a multiple of 8"):
        sparse_linear_decode_triton(x, values, codes)


@pytest.mark.parametrize(("n", "k"), [(64, 32), (80, 96), (200, 1024), (1, 64)])
def test_unpacks_tiles_of_codes(n: int, k: int) -> None:
    w = reference.project_2to4(random((n, k), torch.bfloat16))
    values, codes = reference.pack_2to4(w)
    assert same_bits(unpack_2to4_triton(values, reference.tile_codes(codes)), w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (3, 448), (0, 8), (3, 0)])
@pytest.mark.parametrize("is_given", [False, True])
def test_quantize_fp8_is_bitwise_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, is_given: bool
) -> None:
    w = random(shape, dtype)
    w[..., ::3] *= 1e-3  # among them subnormal numbers, and such as become zero
    given = torch.rand(shape[:-1]).to(DEVICE) * 0.01 + 1e-4 if is_given else None
    values, scale = quantize_fp8_triton(w, given)
    expected, expected_scale = reference.quantize_fp8(w, given)
    assert values.dtype == torch.float8_e4m3fn and values.shape == w.shape
    assert torch.equal(scale, expected_scale) and scale.shape == w.shape[:-1]
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


def test_quantize_fp8_rounds_every_half_to_even_and_spreads_nan() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[1:] + codes[:-1]) / 2
    near = torch.cat((halves * (1 - 2**-20), halves, halves * (1 + 2**-20), codes))
    w = torch.stack((near, -near)).to(DEVICE)
    ones = torch.ones(2, device=DEVICE)
    values, _ = quantize_fp8_triton(w, ones)
    assert torch.equal(
        values.view(torch.uint8), reference.quantize_fp8(w, ones)[0].view(torch.uint8)
    )
    w = torch.tensor([[1.0, math.nan, 2.0], [1.0, math.inf, 2.0], [0, -0.0, 0]], device=DEVICE)
    values, scale = quantize_fp8_triton(w)
    expected, expected_scale = reference.quantize_fp8(w)
    assert torch.equal(values.float().isnan(), expected.float().isnan())
    assert torch.equal(scale.isnan(), expected_scale.isnan()) and scale[2] == 1
    assert values[2].view(torch.uint8).tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_moves_8_bit_values(shape: tuple[int, ...]) -> None:
    w = reference.quantize_fp8(reference.project_2to4(random(shape)))[0]
    values, codes = reference.pack_2to4(w)
    dense = unpack_2to4_triton(values.view(torch.uint8), codes)
    assert dense.dtype == torch.uint8 and torch.equal(dense, w.view(torch.uint8))
