"""A weight in one tensor, without vLLM."""

from __future__ import annotations

import pytest
import torch

from proxsparse import ops
from proxsparse.ops import reference
from proxsparse.vllm.storage import Layout, store

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PARTS = {
    "all sparse": ((40, 8, 8), (True, True, True)),
    "the middle dense": ((40, 8, 24), (True, False, True)),
    "the ends dense": ((8, 40, 3), (False, True, False)),
    "one sparse of two": ((1, 7), (False, True)),
}


def parts_of(
    sizes: tuple[int, ...], is_sparse: tuple[bool, ...], k: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(k)
    parts = [torch.randn(size, k, generator=generator) for size in sizes]
    return [
        (ops.project_2to4(w) if sparse else w).to(dtype)
        for w, sparse in zip(parts, is_sparse, strict=True)
    ]


def stored(
    parts: list[torch.Tensor], is_sparse: tuple[bool, ...]
) -> tuple[torch.Tensor, Layout, torch.Tensor]:
    pairs = list(zip(parts, is_sparse, strict=True))
    values, codes = ops.pack_2to4(torch.cat([w for w, sparse in pairs if sparse]))
    rest = [w for w, sparse in pairs if not sparse]
    sizes = [len(w) for w in parts]
    dense = torch.cat(rest) if rest else None
    return *store(values, codes, dense, sizes, is_sparse), torch.cat(parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [8, 24, 64])
@pytest.mark.parametrize("case", PARTS)
def test_weight_and_product_are_the_dense_ones(case: str, k: int, dtype: torch.dtype) -> None:
    sizes, is_sparse = PARTS[case]
    storage, layout, w = stored(parts_of(sizes, is_sparse, k, dtype), is_sparse)
    assert storage.dim() == 1 and storage.dtype == dtype and storage.is_contiguous()
    assert torch.equal(layout.weight(storage), w)
    generator = torch.Generator().manual_seed(0)
    for lead in ((1,), (5,), (2, 3), (0,)):
        x = torch.randn(*lead, k, generator=generator).to(dtype)
        for bias in (None, torch.randn(len(w), generator=generator).to(dtype)):
            expected = reference.compute_dtype(dtype)
            exact = torch.nn.functional.linear(
                x.double(), w.double(), None if bias is None else bias.double()
            )
            result = layout.product(storage, x, bias)
            assert result.shape == exact.shape and result.dtype == dtype
            tolerance = 1e-5 if dtype == expected else 0.02
            assert torch.allclose(result.double(), exact, atol=tolerance * k**0.5, rtol=tolerance)


def test_the_storage_holds_nothing_twice() -> None:
    storage, layout, _ = stored(
        parts_of((64, 64), (True, False), 64, torch.bfloat16), (True, False)
    )
    assert storage.numel() * 2 == 64 * 64 * 2 * 9 // 16 + 64 * 64 * 2
    values, codes, compressed, dense = layout.views(storage)
    assert compressed is None and dense is not None
    for view in (values, codes, dense):
        assert view.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()


def test_a_copy_of_the_storage_is_the_layer() -> None:
    """What offloads, wakes up or reloads a parameter does no more than that."""
    sizes, is_sparse = PARTS["the middle dense"]
    storage, layout, w = stored(parts_of(sizes, is_sparse, 64, torch.float32), is_sparse)
    parameter = torch.nn.Parameter(storage, requires_grad=False)
    other = torch.zeros_like(parameter)
    other.copy_(parameter)
    parameter.data = torch.empty(0)
    assert torch.equal(layout.weight(other), w)


def test_tiles_and_cusparselts_form_are_found_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper: there values and tiles are cuSPARSELt's form, as bytes behind one another."""
    k, sizes, is_sparse = 64, (64, 64, 64), (True, False, True)

    def lay_out(values: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tiles = reference.tile_codes(codes)
        parts = values.reshape(-1).view(torch.uint8), tiles.reshape(-1)
        return values, tiles, torch.cat(parts)

    monkeypatch.setattr(ops, "lay_out_2to4", lay_out)
    parts = parts_of(sizes, is_sparse, k, torch.bfloat16)
    storage, layout, w = stored(parts, is_sparse)
    values, codes, compressed, dense = layout.views(storage)
    assert codes.dim() == 3 and dense is not None and torch.equal(dense, parts[1])
    assert compressed is not None
    assert torch.equal(compressed, lay_out(values, ops.code_rows(values, codes))[2])
    assert torch.equal(layout.weight(storage), w)


def test_the_product_compiles_without_a_graph_break() -> None:
    sizes, is_sparse = PARTS["the middle dense"]
    storage, layout, _ = stored(parts_of(sizes, is_sparse, 64, torch.float32), is_sparse)
    x, bias = torch.randn(3, 64), torch.randn(sum(sizes))
    compiled = torch.compile(layout.product, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 7):
        x = torch.randn(tokens, 64)
        assert torch.equal(compiled(storage, x, bias), layout.product(storage, x, bias))
