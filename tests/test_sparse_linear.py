"""The product with a packed weight: definition, gradients, refusals."""

from __future__ import annotations

import pytest
import torch

from proxsparse import ops
from proxsparse.errors import ProxsparseError


def packed(n: int, k: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    w = ops.project_2to4(torch.randn(n, k, dtype=dtype))
    return w, *ops.pack_2to4(w)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,), (1,)])
@pytest.mark.parametrize(("n", "k"), [(6, 16), (1, 4), (3, 20)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_is_the_product_with_the_dense_weight(
    lead: tuple[int, ...], n: int, k: int, has_bias: bool
) -> None:
    w, values, codes = packed(n, k)
    x, bias = torch.randn(*lead, k, dtype=w.dtype), torch.randn(n, dtype=w.dtype)
    y = ops.sparse_linear(x, values, codes, bias if has_bias else None)
    expected = x @ w.T + (bias if has_bias else 0)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(y, ops.sparse_linear(x, values, codes, bias if has_bias else None, dense=w))


def test_gradients_reach_the_input_and_the_bias() -> None:
    _, values, codes = packed(6, 16)
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for inputs in (x, x[0, 0].detach().requires_grad_()):
        assert torch.autograd.gradcheck(
            lambda x, b: ops.sparse_linear(x, values, codes, b), (inputs, bias)
        )


def test_gradients_without_a_bias_or_with_a_frozen_input() -> None:
    w, values, codes = packed(6, 16)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    ops.sparse_linear(x, values, codes).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 6, dtype=w.dtype) @ w)
    bias = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    ops.sparse_linear(x.detach(), values, codes, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 3.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 12)}, "the last dimension must be its in_features, 16"),
        ({"x": torch.randn(3, 16).double()}, "x is torch.float64 on cpu, but the weight is"),
        ({"bias": torch.randn(5)}, "the weight has 6 out_features"),
        ({"codes": torch.zeros(6, 3, dtype=torch.uint8)}, "are no packed 2:4 weight"),
        ({"values": torch.zeros(6)}, "are no packed 2:4 weight"),
    ],
)
def test_refuses(change: dict[str, torch.Tensor], message: str) -> None:
    _, values, codes = packed(6, 16, torch.float32)
    arguments = {"x": torch.randn(3, 16), "values": values, "codes": codes, **change}
    with pytest.raises(ProxsparseError, match=message):
        ops.sparse_linear(**arguments)
