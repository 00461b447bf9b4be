"""A linear layer's weight, sparse and dense parts, in one tensor.

vLLM moves, offloads, puts to sleep and reloads parameters one by one. Tensors that share memory
would come apart there, or be copied more than once. So a layer keeps a single parameter, of the
weight's dtype and with one dimension: values, codes (on a GPU in tiles, so that on Hopper the two
are cuSPARSELt's form as well), and then the rows that are dense. What kernels read are views, made
anew at each call; they cost no launch, and in a CUDA graph nothing at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proxsparse import ops


@dataclass(frozen=True)
class Layout:
    """Where the parts of one weight [N, K] lie in its storage.

    Attributes:
        sizes: rows of each part, in the order of the output.
        is_sparse: whether each part is packed.
        k: input features.
        codes_shape: of the codes of all sparse rows, in rows or in tiles.
        is_compressed: whether values and codes are what cuSPARSELt reads too.
    """

    sizes: tuple[int, ...]
    is_sparse: tuple[bool, ...]
    k: int
    codes_shape: tuple[int, ...]
    is_compressed: bool

    def rows(self, is_sparse: bool) -> int:
        """Rows of the sparse or of the dense parts."""
        parts = zip(self.sizes, self.is_sparse, strict=True)
        return sum(size for size, sparse in parts if sparse == is_sparse)

    def views(self, storage: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The forms of the weight, in the memory of the storage.

        Args:
            storage: from `store`.

        Returns:
            (values [Ns, K/2], codes, compressed or None, dense [Nd, K] or None).
        """
        n, size = self.rows(True), storage.element_size()
        num_values = n * self.k // 2
        num_codes = torch.Size(self.codes_shape).numel()
        data = storage.view(torch.uint8)
        end = num_values * size + num_codes
        values = storage[:num_values].view(n, self.k // 2)
        codes = data[num_values * size : end].view(self.codes_shape)
        compressed = data[:end] if self.is_compressed else None
        dense = storage[-(-end // size) :].view(-1, self.k) if self.rows(False) else None
        return values, codes, compressed, dense

    def product(self, storage: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer x @ W^T + bias: one sparse product, and one dense where a part is dense.

        Args:
            storage: from `store`.
            x: [..., K], of its dtype.
            bias: [N] in the order of the output, or None.

        Returns:
            [..., N]. Where parts differ, their results are copied into one.
        """
        values, codes, compressed, dense = self.views(storage)
        if dense is None:
            return ops.sparse_linear(x, values, codes, bias, compressed=compressed)
        results = {
            True: ops.sparse_linear(x, values, codes, self._of(bias, True), compressed=compressed),
            False: torch.nn.functional.linear(x, dense, self._of(bias, False)),
        }
        return self._merged(results, -1)

    def weight(self, storage: Tensor) -> Tensor:
        """The dense weight [N, K], made anew."""
        values, codes, _, dense = self.views(storage)
        w = ops.unpack_2to4(values, codes)
        return w if dense is None else self._merged({True: w, False: dense}, 0)

    def _merged(self, of_kind: dict[bool, Tensor], dim: int) -> Tensor:
        """The parts, which follow one another in each kind, in the order of the output."""
        starts, pieces = {True: 0, False: 0}, []
        for size, sparse in zip(self.sizes, self.is_sparse, strict=True):
            pieces.append(of_kind[sparse].narrow(dim, starts[sparse], size))
            starts[sparse] += size
        return torch.cat(pieces, dim)

    def _of(self, bias: Tensor | None, is_sparse: bool) -> Tensor | None:
        """The bias of the sparse or of the dense parts."""
        if bias is None:
            return None
        pieces, start = [], 0
        for size, sparse in zip(self.sizes, self.is_sparse, strict=True):
            if sparse == is_sparse:
                pieces.append(bias[start : start + size])
            start += size
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def store(
    values: Tensor,
    codes: Tensor,
    dense: Tensor | None,
    sizes: Sequence[int],
    is_sparse: Sequence[bool],
) -> tuple[Tensor, Layout]:
    """Lay a weight out in one tensor, as the kernels of its device read it.

    Args:
        values: [Ns, K/2] of the sparse parts behind one another, from `ops.pack_2to4`.
        codes: uint8 [Ns, ceil(K/8)] of them.
        dense: [Nd, K] of the dense parts behind one another, or None.
        sizes: rows of each part, in the order of the output.
        is_sparse: whether each part is packed.

    Returns:
        (storage, layout), the storage with one dimension and of the dtype of values.

    Cost: memory-bound; takes up to twice the packed weight beside it.
    """
    k = 2 * values.shape[1]
    values, codes, compressed = ops.lay_out_2to4(values, codes)
    pieces = [values.reshape(-1).view(torch.uint8), codes.reshape(-1)]
    pieces.append(codes.new_zeros(-codes.numel() % values.element_size()))
    if dense is not None:
        pieces.append(dense.reshape(-1).view(torch.uint8))
    storage = torch.cat(pieces).view(values.dtype)
    if storage.is_cuda:  # the kernel for few tokens reads it ahead of its turn on the stream
        torch.cuda.current_stream(storage.device).synchronize()
    shape = tuple(codes.shape)
    return storage, Layout(tuple(sizes), tuple(is_sparse), k, shape, compressed is not None)
