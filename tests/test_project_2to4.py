"""The projection onto 2:4: kept entries bitwise, pruned ones exact +0.0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from proxsparse.errors import ProxsparseError
from proxsparse.ops import is_2to4, mask_2to4, project_2to4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The bit patterns: unlike ==, they tell -0.0 from +0.0."""
    return x.contiguous().view(BITS[x.element_size()])


@pytest.mark.parametrize("shape", [(4,), (3, 4), (5, 36), (2, 3, 20), (1, 2052)])
def test_keeps_bitwise_and_prunes_to_plus_zero(
    place: dict[str, Any], shape: tuple[int, ...]
) -> None:
    w = torch.randn(shape, **place)
    before, mask = w.clone(), mask_2to4(w)
    out = project_2to4(w)
    assert out.dtype == w.dtype and out.shape == w.shape
    assert torch.equal(bits(out), torch.where(mask, bits(w), 0))
    assert torch.equal(w, before)  # the operand is left alone
    assert is_2to4(out)
    assert torch.equal(bits(project_2to4(out)), bits(out))  # idempotent


def test_negative_and_negative_zero_entries_prune_to_plus_zero(place: dict[str, Any]) -> None:
    w = torch.tensor([[-5.0, -4.0, -3.0, -0.0], [3.0, -0.0, 2.0, -0.0]], **place)
    out = project_2to4(w)
    assert out.tolist() == [[-5, -4, 0, 0], [3, 0, 2, 0]]
    assert torch.equal(out.signbit(), torch.tensor([[1, 1, 0, 0], [0] * 4], device=out.device) > 0)


def test_ties_keep_the_lower_index(place: dict[str, Any]) -> None:
    w = torch.tensor([[1, -1, 1, 1], [1, 2, -1, 1]], **place)
    assert project_2to4(w).tolist() == [[1, -1, 0, 0], [1, 2, 0, 0]]


@pytest.mark.parametrize("score_dtype", [torch.float32, torch.bfloat16])
def test_by_a_score_of_any_dtype(place: dict[str, Any], score_dtype: torch.dtype) -> None:
    w = torch.randn(6, 12, **place)
    score = torch.randint(0, 4, w.shape, device=w.device).to(score_dtype)
    out = project_2to4(w, score)
    assert out.dtype == w.dtype
    assert torch.equal(bits(out), torch.where(mask_2to4(score), bits(w), 0))


def test_non_contiguous(place: dict[str, Any]) -> None:
    w, score = torch.randn(16, 12, **place).T, torch.randn(24, 16, **place)[::2]
    assert torch.equal(project_2to4(w, score), project_2to4(w.contiguous(), score.contiguous()))


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0)])
def test_empty(place: dict[str, Any], shape: tuple[int, ...]) -> None:
    out = project_2to4(torch.empty(shape, **place))
    assert out.shape == shape and out.dtype == place["dtype"]


@pytest.mark.parametrize(
    ("w", "score", "message"),
    [
        (torch.ones(2, 6), None, r"w has shape \[2, 6\]: the last dimension must be a multiple"),
        (torch.ones(4, dtype=torch.int32), None, r"w has dtype torch.int32: a floating dtype"),
        (torch.ones(2, 4), torch.ones(4, 2), r"score is \[4, 2\] on cpu, but w is \[2, 4\] on cpu"),
    ],
    ids=["six_columns", "integer", "score_of_another_shape"],
)
def test_bad_input(w: Tensor, score: Tensor | None, message: str) -> None:
    with pytest.raises(ProxsparseError, match=message):
        project_2to4(w, score)
