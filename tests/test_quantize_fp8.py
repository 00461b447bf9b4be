"""Rounding rows to e4m3 with a scale each: exact, and the same before pruning as after it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.errors import ProxsparseError
from proxsparse.ops import FP8, quantize_fp8, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bits(x: Tensor) -> Tensor:
    return x.cpu().view(torch.uint8)


def e4m3_numbers() -> Tensor:
    """All finite e4m3 numbers that are not negative, ascending: their index is their code."""
    codes = torch.arange(127)
    exponent, fraction = codes >> 3, codes & 7
    normal = (8 + fraction) * 2.0 ** (exponent - 10)
    return torch.where(exponent == 0, fraction * 2.0**-9, normal).double()


def nearest_codes(x: Tensor) -> Tensor:
    """Codes of the e4m3 numbers closest to x (float64, |x| <= 448), the even one of two."""
    numbers = e4m3_numbers().to(x.device)
    distance = (numbers - x.abs().unsqueeze(-1)).abs()
    best = distance.amin(-1, keepdim=True)
    is_best = distance == best
    codes = torch.arange(127, device=x.device).expand_as(distance)
    even = torch.where(is_best & (codes % 2 == 0), codes, -1).amax(-1)
    code = torch.where(even >= 0, even, torch.where(is_best, codes, -1).amax(-1))
    return torch.where((x < 0) & (code > 0), code + 128, code).to(torch.uint8)


def rows(place: dict[str, Any], n: int = 5, k: int = 72) -> Tensor:
    """Rows of very different sizes, each with small entries and an exact zero."""
    w = torch.randn(n, k, dtype=torch.float64) * torch.logspace(-3, 2, n).double().unsqueeze(1)
    w[:, ::7] *= 1e-3
    w[:, 3] = 0
    return w.to(**place)


@pytest.mark.parametrize("shape", [(5, 72), (2, 3, 20), (7,), (1, 1)])
def test_values_are_the_nearest_and_the_largest_is_448(
    place: dict[str, Any], shape: tuple[int, ...]
) -> None:
    w = torch.randn(shape).to(**place)
    values, scale = quantize_fp8(w)
    assert values.dtype == FP8 and values.shape == w.shape
    assert scale.dtype == torch.float32 and scale.shape == w.shape[:-1]
    assert torch.equal(scale, w.float().abs().amax(-1) / 448)
    ratio = (w.float() / scale.unsqueeze(-1)).clamp(-448, 448)
    assert torch.equal(bits(values), nearest_codes(ratio.double()).cpu())
    assert bool((values.float().abs().amax(-1) == 448).all())


def test_halves_round_to_even_and_large_ones_saturate(place: dict[str, Any]) -> None:
    numbers = e4m3_numbers()
    halves = (numbers[1:] + numbers[:-1]) / 2  # exact, and so in bfloat16 and float16
    w = torch.cat((halves, -halves, torch.tensor([500.0, -1000.0]))).to(**place)[None]
    scale = torch.ones(1, device=w.device)
    values, same = quantize_fp8(w, scale)
    assert torch.equal(same, scale)
    assert torch.equal(bits(values)[0, :-2], nearest_codes(w[0, :-2].double()).cpu())
    assert values.float()[0, -2:].tolist() == [448, -448]
    assert not (bits(values) == 0x80).any()  # half of the smallest number, below zero, is +0


def test_zeros_are_plus_zero_and_rows_of_zeros_have_a_scale(place: dict[str, Any]) -> None:
    w = torch.tensor([[0.0, -0.0, -1e-7, 1.0], [0.0, -0.0, 0.0, 0.0]]).to(**place)
    values, scale = quantize_fp8(w)
    assert bits(values).tolist() == [[0, 0, 0, 0x7E], [0, 0, 0, 0]]
    assert scale[1] == 1 and scale[0] == torch.tensor(1.0) / 448


def test_tiny_rows_keep_a_normal_scale(place: dict[str, Any]) -> None:
    smallest = torch.finfo(place["dtype"]).tiny
    w = torch.tensor([[0.0, max(smallest, 2.0**-126)]]).to(**place)
    values, scale = quantize_fp8(w)
    assert scale[0] >= 2.0**-126 and values.float()[0, 1] > 0


def test_pruning_and_rounding_commute(place: dict[str, Any]) -> None:
    w = rows(place)
    mask = ops.mask_2to4(w)
    _, scale = quantize_fp8(w)
    pruned_first = quantize_fp8(torch.where(mask, w, torch.zeros_like(w)), scale)[0]
    rounded_first = quantize_fp8(w, scale)[0]
    zero = torch.zeros((), dtype=torch.uint8)
    pruned_last = torch.where(mask.cpu(), bits(rounded_first), zero)
    assert torch.equal(bits(pruned_first), pruned_last)
    assert not pruned_last[~mask.cpu()].any()


def test_rounding_twice_changes_nothing(place: dict[str, Any]) -> None:
    w = rows(place)
    values, scale = quantize_fp8(w)
    again, same = quantize_fp8(reference.dequantize_fp8(values, scale, torch.float32))
    torch.testing.assert_close(same, scale, rtol=2e-7, atol=0)
    assert torch.equal(bits(again), bits(values))


def test_non_contiguous_and_empty(place: dict[str, Any]) -> None:
    w = rows(place)
    strided = w.T.contiguous().T
    assert torch.equal(bits(quantize_fp8(strided)[0]), bits(quantize_fp8(w)[0]))
    for shape in ((0, 8), (3, 0), (0,)):
        values, scale = quantize_fp8(torch.empty(shape).to(**place))
        assert values.shape == shape and scale.shape == shape[:-1]


def test_damaged_rows_stay_damaged_inside_a_graph(place: dict[str, Any]) -> None:
    w = torch.ones(3, 8).to(**place)
    w[0, 1], w[1, 2] = math.nan, math.inf
    values, _ = torch.ops.proxsparse.quantize_fp8(w, None)
    assert values.float()[0].isnan().all() and values.float()[1].isnan().any()
    assert (values.float()[2] == 448).all()


@pytest.mark.parametrize(
    ("w", "scale", "message"),
    [
        (torch.tensor([[1.0, math.nan]]), None, "w has 1 entries that are NaN or infinite"),
        (torch.tensor([[math.inf, 1.0]]), None, "w has 1 entries that are NaN or infinite"),
        (torch.ones(2, 4, dtype=torch.int8), None, "rows of float32, bfloat16 or float16"),
        (torch.ones(2, 4).to(FP8), None, "rows of float32, bfloat16 or float16"),
        (torch.tensor(1.0), None, r"w is \[\] of"),
        (torch.ones(2, 4), torch.ones(3), r"scale is \[3\] of torch.float32"),
        (torch.ones(2, 4), torch.ones(2).half(), r"w needs \[2\] of torch.float32"),
        (torch.ones(2, 4), torch.zeros(2), "each must be positive"),
    ],
)
def test_refuses(w: Tensor, scale: Tensor | None, message: str) -> None:
    with pytest.raises(ProxsparseError, match=message):
        quantize_fp8(w, scale)
