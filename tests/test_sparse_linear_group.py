"""Several products of one input in one call: definition and refusals; see test_compiler.py."""

from __future__ import annotations

import pytest
import torch

from proxsparse import ops
from proxsparse.errors import ProxsparseError


def packed(n: int, k: int) -> tuple[torch.Tensor, ...]:
    return ops.pack_2to4(ops.project_2to4(torch.randn(n, k, dtype=torch.float64)))


def test_each_is_the_product_alone() -> None:
    weights = [packed(n, 20) for n in (6, 1, 9)]
    biases = [torch.randn(6, dtype=torch.float64), None, None]
    dense = [None, ops.unpack_2to4(*weights[1]), None]
    values, codes = zip(*weights, strict=True)
    for lead in ((5,), (), (2, 3), (0,)):
        x = torch.randn(*lead, 20, dtype=torch.float64)
        results = ops.sparse_linear_group(x, values, codes, biases, [None] * 3, dense)
        for y, weight, bias in zip(results, weights, biases, strict=True):
            assert torch.equal(y, ops.sparse_linear(x, *weight, bias))


def test_every_weight_is_checked() -> None:
    (values, codes), other = packed(6, 16), packed(6, 12)
    x = torch.randn(3, 16, dtype=torch.float64)
    with pytest.raises(ProxsparseError, match="the last dimension must be its in_features, 12"):
        ops.sparse_linear_group(
            x, [values, other[0]], [codes, other[1]], [None, None], [None, None], [None, None]
        )
    with pytest.raises(ValueError, match="shorter"):
        ops.sparse_linear_group(x, [values, values], [codes], [None, None], [None], [None])
