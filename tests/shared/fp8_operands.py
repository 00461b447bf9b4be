"""Operands of the FP8 kernels' tests: whole numbers, so that every sum is exact."""

from __future__ import annotations

import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.ops import FP8, reference


class Operands:
    """Of a product [m, n] over k columns: rounded tokens and weight, their scales, a bias."""

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(m + n + k)
        w = torch.randint(-4, 5, (n, k), generator=generator).float()
        w = ops.project_2to4(w, torch.rand(n, k, generator=generator))
        self.w, self.dtype = w.to(FP8), dtype
        self.values, self.codes = ops.pack_2to4(self.w)
        self.tiles = reference.tile_codes_8_bit(self.codes)
        self.x = torch.randint(-3, 4, (m, k), generator=generator).float().to(FP8)
        self.token_scales, self.row_scales = (
            2.0 ** torch.randint(-2, 3, (count,), generator=generator) for count in (m, n)
        )
        self.bias = torch.randint(-9, 10, (n,), generator=generator).to(dtype)

    def exact(self, has_bias: bool = True) -> Tensor:
        y = self.x.double() @ self.w.double().T
        y = y * self.token_scales.double().unsqueeze(1) * self.row_scales.double()
        return (y + self.bias.double() * has_bias).to(self.dtype)
