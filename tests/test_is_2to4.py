"""The check that every group of four has at most two non-zeros."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from proxsparse.errors import ProxsparseError
from proxsparse.ops import is_2to4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("support", list(itertools.product((0, 1), repeat=4)), ids=str)
def test_every_support(place: dict[str, Any], support: tuple[int, ...]) -> None:
    found = is_2to4(torch.tensor(support, **place))
    assert found.dtype == torch.bool and found.shape == () and found.device.type == place["device"]
    assert bool(found) == (sum(support) <= 2)


@pytest.mark.parametrize("position", [0, 1, 4095, 4096, 8190, 8191])
def test_one_bad_group_among_many(place: dict[str, Any], position: int) -> None:
    w = torch.zeros(16, 2048, **place)
    groups = w.view(-1, 4)
    groups[:, 1:3] = torch.randn(8192, 2, **place)
    assert is_2to4(w)
    groups[position, 0] = torch.finfo(w.dtype).tiny
    assert not is_2to4(w)


@pytest.mark.parametrize(
    ("third", "expected"),
    [(-0.0, True), (math.nan, False), (math.inf, False)],
    ids=["minus_zero", "nan", "inf"],
)
def test_what_counts_as_zero(place: dict[str, Any], third: float, expected: bool) -> None:
    assert bool(is_2to4(torch.tensor([1.0, third, 2.0, 0.0], **place))) == expected


def test_groups_run_along_the_last_dimension(place: dict[str, Any]) -> None:
    w = torch.zeros(4, 8, **place)
    w[:, 3] = 1  # two non-zeros a row, four a column
    w[:, 7] = 1
    assert is_2to4(w)
    assert not is_2to4(w.T)  # not contiguous


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0)])
def test_empty_is_2to4(place: dict[str, Any], shape: tuple[int, ...]) -> None:
    assert is_2to4(torch.empty(shape, **place))


@pytest.mark.parametrize("k", [1, 2, 6])
def test_bad_shape(k: int) -> None:
    with pytest.raises(ProxsparseError, match=rf"w has shape \[3, {k}\]: the last dimension"):
        is_2to4(torch.zeros(3, k))
