"""The product with a packed weight in FP8: definition, packing, tiles of codes, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.errors import ProxsparseError
from proxsparse.ops import FP8, reference

Packed = tuple[Tensor, Tensor, Tensor]


def packed(n: int, k: int, dtype: torch.dtype = torch.float32) -> Packed:
    """Values, codes and scales of a random weight."""
    values, scale = ops.quantize_fp8(ops.project_2to4(torch.randn(n, k, dtype=dtype)))
    return *ops.pack_2to4(values), scale


def exact(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """The definition in float64, on operands rounded as it rounds them."""
    values, codes, scale = weight
    x_values, x_scale = ops.quantize_fp8(x)
    w = ops.unpack_2to4(values, codes).double()
    y = x_values.double() @ w.T * x_scale.double().unsqueeze(-1) * scale.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,), (1,)])
@pytest.mark.parametrize(("n", "k"), [(6, 16), (1, 4), (3, 20), (48, 256)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_is_the_product_of_the_rounded_operands(
    dtype: torch.dtype, lead: tuple[int, ...], n: int, k: int, has_bias: bool
) -> None:
    weight = packed(n, k, dtype)
    x = torch.randn(*lead, k, dtype=dtype)
    bias = torch.randn(n, dtype=dtype) if has_bias else None
    y = ops.sparse_linear_fp8(x, *weight, bias)
    assert y.dtype == dtype and y.shape == (*lead, n)
    expected = exact(x, weight, bias)
    half_a_unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(y.double(), expected, rtol=1.01 * half_a_unit, atol=2e-5)
    dense = ops.unpack_2to4(*weight[:2])
    given = ops.sparse_linear_fp8(x, *weight, bias, dense=dense)
    assert torch.equal(y, given)


@pytest.mark.parametrize("k", [64, 1024])
def test_is_close_to_the_product_before_rounding(k: int) -> None:
    w, x = ops.project_2to4(torch.randn(32, k)), torch.randn(16, k)
    values, scale = ops.quantize_fp8(w)
    y = ops.sparse_linear_fp8(x, *ops.pack_2to4(values), scale)
    error = (y - x @ w.T).norm() / (x @ w.T).norm()
    assert 0.01 < error < 0.05  # e4m3 keeps 4 bits: about 0.026 an operand


def test_a_token_does_not_depend_on_the_others() -> None:
    weight, x = packed(8, 32), torch.randn(4, 32)
    x[1] *= 1e4
    x[2, 3] = torch.inf
    y = ops.sparse_linear_fp8(x, *weight)
    alone = torch.stack([ops.sparse_linear_fp8(row, *weight) for row in x])
    torch.testing.assert_close(y, alone, equal_nan=True)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("shape", [(4,), (3, 4), (5, 36), (2, 3, 20), (3, 1028)])
def test_packing_is_exact(shape: tuple[int, ...]) -> None:
    values = ops.quantize_fp8(ops.project_2to4(torch.randn(shape)))[0]
    kept, codes = ops.pack_2to4(values)
    assert kept.dtype == FP8 and kept.shape == (*shape[:-1], shape[-1] // 2)
    back = ops.unpack_2to4(kept, codes)
    assert back.dtype == FP8 and torch.equal(back.view(torch.uint8), values.view(torch.uint8))
    assert ops.is_2to4(values) and not ops.is_2to4(torch.ones(4).to(FP8))


def test_projection_and_mask_rank_8_bit_values() -> None:
    w = torch.tensor([[1.0, -3.0, 2.0, -0.0]]).to(FP8)
    assert ops.mask_2to4(w).tolist() == [[False, True, True, False]]
    assert ops.project_2to4(w).view(torch.uint8).tolist() == [[0, 0xC4, 0x40, 0]]


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_packing_refuses_nan(code: int) -> None:
    w = torch.tensor([[0, 0x38, code, 0]], dtype=torch.uint8).view(FP8)
    with pytest.raises(ProxsparseError, match="w has 1 values with the code of NaN"):
        ops.pack_2to4(w)
    with pytest.raises(ProxsparseError, match="w is not 2:4: row 0, columns 0 to 3"):
        ops.pack_2to4(torch.ones(1, 4).to(FP8))


@pytest.mark.parametrize(("n", "k"), [(64, 64), (128, 192), (80, 64), (1, 64)])
def test_tiles_of_codes(n: int, k: int) -> None:
    values, codes, scale = packed(n, k)
    tiles = reference.tile_codes_8_bit(codes)
    assert tiles.shape == (-(-n // 64), k // 64, 512)
    for row in range(0, n, 5):
        for column in range(k // 64):
            for half in range(2):
                warp, of_warp = row % 64 // 16, row % 16
                thread = 32 * warp + of_warp % 8 * 4 + half * 2 + of_warp // 8
                held = tiles[row // 64, column, 4 * thread : 4 * thread + 4]
                first = column * 8 + half * 4
                assert torch.equal(held, codes[row, first : first + 4])
    assert torch.equal(reference.untile_codes_8_bit(tiles, n), codes)
    assert torch.equal(ops.code_rows(values, tiles), codes)
    plain, tiled = ops.unpack_2to4(values, codes), ops.unpack_2to4(values, tiles)
    assert torch.equal(plain.view(torch.uint8), tiled.view(torch.uint8))
    x = torch.randn(3, k)
    y = ops.sparse_linear_fp8(x, values, tiles, scale)
    assert torch.equal(y, ops.sparse_linear_fp8(x, values, codes, scale))


def test_tiles_of_16_bits_do_not_pass_for_those_of_8() -> None:
    values, codes, scale = packed(64, 128)
    wrong = reference.tile_codes(codes)
    with pytest.raises(ProxsparseError, match="are no packed 2:4 weight"):
        ops.sparse_linear_fp8(torch.randn(3, 128), values, wrong, scale)
    with pytest.raises(ProxsparseError, match=r"need tiles of codes of shape \(1, 2, 512\)"):
        ops.code_rows(values, wrong)


def test_gradients_pass_the_rounding_and_reach_the_bias() -> None:
    weight = packed(6, 16)
    w = reference.dequantize_fp8(ops.unpack_2to4(*weight[:2]), weight[2], torch.float32)
    x, bias = torch.randn(3, 16, requires_grad=True), torch.randn(6, requires_grad=True)
    for dense in (None, ops.unpack_2to4(*weight[:2])):
        x.grad = bias.grad = None
        ops.sparse_linear_fp8(x, *weight, bias, dense=dense).sum().backward()
        torch.testing.assert_close(x.grad, torch.ones(3, 6) @ w)
        assert torch.equal(bias.grad, torch.full((6,), 3.0))


WEIGHT = packed(6, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 12)}, "the last dimension must be its in_features, 16"),
        ({"x": torch.randn(3, 16).double()}, "bfloat16, float16 or float32 is needed"),
        ({"x": torch.randn(3, 16, device="meta")}, "x is torch.float32 on meta"),
        ({"bias": torch.randn(5)}, "the weight has 6 out_features"),
        ({"bias": torch.randn(6).half()}, "but the bias is torch.float16"),
        ({"codes": torch.zeros(6, 3, dtype=torch.uint8)}, "are no packed 2:4 weight"),
        ({"values": torch.zeros(6, 8)}, "values are torch.float32: sparse_linear_fp8"),
        ({"values": torch.zeros(6, 8).to(torch.float8_e5m2)}, "in 8 bits torch.float8_e4m3fn"),
        ({"weight_scale": torch.ones(5)}, r"weight_scale is \[5\] of torch.float32: the weight"),
        ({"weight_scale": torch.ones(6, 1)}, "the weight has 6 rows"),
        ({"weight_scale": torch.ones(6).half()}, "of torch.float16"),
        ({"dense": torch.zeros(6, 16)}, "the same weight is"),
    ],
)
def test_refuses(change: dict[str, Tensor], message: str) -> None:
    names = ("values", "codes", "weight_scale")
    arguments = {"x": torch.randn(3, 16), **dict(zip(names, WEIGHT, strict=True)), **change}
    with pytest.raises(ProxsparseError, match=message):
        ops.sparse_linear_fp8(**arguments)


def test_the_16_bit_op_names_this_one() -> None:
    with pytest.raises(ProxsparseError, match="use sparse_linear_fp8"):
        ops.sparse_linear(torch.randn(3, 16), *WEIGHT[:2])
