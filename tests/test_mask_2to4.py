"""The mask of the two largest scores: exact, so everything is compared with `torch.equal`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from proxsparse.errors import ProxsparseError
from proxsparse.ops import mask_2to4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expected_mask(score: Tensor) -> Tensor:
    """One group at a time: Python's sort is stable, so ties keep the lower index."""
    rows = []
    for group in score.reshape(-1, 4).abs().tolist():
        kept = sorted(range(4), key=lambda i: -group[i])[:2]
        rows.append([i in kept for i in range(4)])
    mask = torch.tensor(rows, dtype=torch.bool, device=score.device)
    return mask.reshape(score.shape)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (5, 36), (2, 3, 20), (1, 2052)])
def test_keeps_the_two_largest_magnitudes(place: dict[str, Any], shape: tuple[int, ...]) -> None:
    # Few distinct values, so that most groups hold ties.
    score = torch.randint(-3, 4, shape, device=place["device"]).to(place["dtype"])
    mask = mask_2to4(score)
    assert mask.dtype == torch.bool and mask.shape == score.shape
    assert torch.equal(mask, expected_mask(score))


def test_every_order_of_four(place: dict[str, Any]) -> None:
    score = torch.tensor(list(itertools.permutations((1.0, -2.0, 3.0, -4.0))), **place)
    assert torch.equal(mask_2to4(score), score.abs() > 2.5)


def test_ties_keep_the_lower_index(place: dict[str, Any]) -> None:
    score = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 2, -1, 1], [-1, 0, 1, 1]], **place)
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]])
    assert torch.equal(mask_2to4(score), expected.to(place["device"], torch.bool))


def test_non_contiguous(place: dict[str, Any]) -> None:
    score = torch.randn(16, 12, **place).T
    assert torch.equal(mask_2to4(score), mask_2to4(score.contiguous()))


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0)])
def test_empty(place: dict[str, Any], shape: tuple[int, ...]) -> None:
    mask = mask_2to4(torch.empty(shape, **place))
    assert mask.shape == shape and mask.dtype == torch.bool


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (torch.ones(2, 6), r"score has shape \[2, 6\]: the last dimension must be a multiple of 4"),
        (torch.tensor(1.0), r"score has shape \[\]: the last dimension"),
        (torch.ones(4, dtype=torch.int64), r"score has dtype torch.int64: a floating dtype"),
    ],
    ids=["six_columns", "scalar", "integer"],
)
def test_bad_input(score: Tensor, message: str) -> None:
    with pytest.raises(ProxsparseError, match=message):
        mask_2to4(score)
