"""Packing to values and 4-bit codes, and back: exact."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.errors import ProxsparseError
from proxsparse.ops import mask_2to4, pack_2to4, project_2to4, reference, unpack_2to4
from proxsparse.ops.reference import codes_to_mask, mask_to_codes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = tuple(itertools.combinations(range(4), 2))


@pytest.mark.parametrize("shape", [(4,), (8,), (3, 4), (5, 36), (2, 3, 20), (3, 1028)])
def test_round_trip(place: dict[str, Any], shape: tuple[int, ...]) -> None:
    w = project_2to4(torch.randn(shape, **place))
    values, codes = pack_2to4(w)
    *lead, k = shape
    assert values.shape == (*lead, k // 2) and values.dtype == w.dtype
    assert codes.shape == (*lead, (k + 7) // 8) and codes.dtype == torch.uint8
    out = unpack_2to4(values, codes)
    assert out.dtype == w.dtype and torch.equal(out, w)
    assert not out[out == 0].signbit().any()


@pytest.mark.parametrize("i_j", PAIRS, ids=str)
def test_layout_of_values_and_codes(place: dict[str, Any], i_j: tuple[int, int]) -> None:
    i, j = i_j
    w = torch.zeros(1, 12, **place)
    w[0, i], w[0, j] = -1, 2  # group 0: the low nibble of byte 0
    w[0, 4:6] = torch.tensor([3.0, 4.0])  # group 1, positions 0 and 1: the high nibble
    w[0, 10:] = torch.tensor([5.0, 6.0])  # group 2, positions 2 and 3; then a zero nibble
    values, codes = pack_2to4(w)
    assert values.tolist() == [[-1, 2, 3, 4, 5, 6]]
    assert codes.tolist() == [[(i | j << 2) | (0 | 1 << 2) << 4, 2 | 3 << 2]]


def test_fewer_than_two_nonzeros_take_the_lowest_free_positions(place: dict[str, Any]) -> None:
    w = torch.tensor([[0, 0, 0, 7], [0, 8, 0, 0], [0, 0, 0, 0]], **place)
    values, codes = pack_2to4(w)
    assert values.tolist() == [[0, 7], [0, 8], [0, 0]]
    assert codes.tolist() == [[0 | 3 << 2], [0 | 1 << 2], [0 | 1 << 2]]
    assert torch.equal(unpack_2to4(values, codes), w)


def test_non_contiguous(place: dict[str, Any]) -> None:
    w = project_2to4(torch.randn(6, 24, **place))
    strided = w.T.contiguous().T
    assert not strided.is_contiguous()
    values, codes = pack_2to4(strided)
    assert torch.equal(values, pack_2to4(w)[0]) and torch.equal(codes, pack_2to4(w)[1])
    assert torch.equal(unpack_2to4(values.T.contiguous().T, codes.T.contiguous().T), w)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0)])
def test_empty(place: dict[str, Any], shape: tuple[int, ...]) -> None:
    values, codes = pack_2to4(torch.empty(shape, **place))
    assert unpack_2to4(values, codes).shape == shape


@pytest.mark.parametrize("k", [4, 8, 12, 44])
def test_codes_of_a_mask_and_back(k: int) -> None:
    mask = mask_2to4(torch.randn(5, k))
    codes = mask_to_codes(mask)
    assert codes.shape == (5, (k + 7) // 8)
    assert torch.equal(codes_to_mask(codes, k), mask)


def test_refuses_what_is_not_2to4_by_row_and_columns(place: dict[str, Any]) -> None:
    w = project_2to4(torch.randn(5, 20, **place))
    w[3, 8:12] = torch.tensor([1.0, 2.0, 0.0, 4.0])
    w[4] = 1  # a later one, not the first
    message = r"not 2:4: row 3, columns 8 to 11 hold \[1\.0, 2\.0, 0\.0, 4\.0\].*project_2to4"
    with pytest.raises(ProxsparseError, match=message):
        pack_2to4(w)


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (torch.zeros(2, 6), r"w has shape \[2, 6\]: the last dimension must be a multiple of 4"),
        (torch.zeros(4, dtype=torch.int8), r"w has dtype torch.int8: a floating dtype is needed"),
    ],
    ids=["six_columns", "integer"],
)
def test_pack_bad_input(w: Tensor, message: str) -> None:
    with pytest.raises(ProxsparseError, match=message):
        pack_2to4(w)


@pytest.mark.parametrize(
    ("values", "codes"),
    [
        (torch.zeros(2, 6), torch.zeros(2, 1, dtype=torch.uint8)),
        (torch.zeros(2, 6), torch.zeros(3, 2, dtype=torch.uint8)),
        (torch.zeros(2, 6), torch.zeros(2, 2, dtype=torch.int32)),
        (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.uint8)),
        (torch.tensor(0.0), torch.zeros(1, dtype=torch.uint8)),
    ],
    ids=["short_row", "other_rows", "int32", "half_a_group", "scalar"],
)
def test_unpack_bad_input(values: Tensor, codes: Tensor) -> None:
    with pytest.raises(ProxsparseError, match=r"need codes of shape .* and dtype uint8, not"):
        unpack_2to4(values, codes)


@pytest.mark.parametrize(("n", "k"), [(64, 32), (128, 96), (80, 64), (1, 32)])
def test_tiles_of_codes(n: int, k: int) -> None:
    values, codes = ops.pack_2to4(ops.project_2to4(torch.randn(n, k)))
    tiles = reference.tile_codes(codes)
    assert tiles.shape == (-(-n // 64), k // 32, 256)
    for row in range(0, n, 7):
        for group in range(k // 4):
            tile = tiles[row // 64, group // 8]
            byte = tile[row % 64 // 16 * 64 + row % 8 * 8 + group % 4 * 2 + group % 8 // 4]
            code = codes[row, group // 2] >> 4 * (group % 2) & 15
            assert byte >> 4 * (row % 16 // 8) & 15 == code
    assert torch.equal(reference.untile_codes(tiles, n), codes)
    assert (
        torch.equal(ops.code_rows(values, tiles), codes) and ops.code_rows(values, codes) is codes
    )
    assert torch.equal(ops.unpack_2to4(values, tiles), ops.unpack_2to4(values, codes))
    x = torch.randn(3, k)
    assert torch.equal(ops.sparse_linear(x, values, tiles), ops.sparse_linear(x, values, codes))


def test_tiles_that_do_not_fit() -> None:
    values, codes = ops.pack_2to4(ops.project_2to4(torch.randn(64, 32)))
    with pytest.raises(ProxsparseError, match=r"need tiles of codes of shape \(1, 1, 256\)"):
        ops.code_rows(values, reference.tile_codes(codes)[..., :128])
    assert ops.lay_out_2to4(values, codes) == (values, codes, None)
