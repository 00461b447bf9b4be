"""The proximal operator against the published one.

    python benchmarks/bench_prox_2to4.py [--shapes 4096x4096 ...] [--quick] [--out DIR]

The baseline is the algorithm of arXiv:2502.00258 (EnumALM) as published: eager PyTorch, coordinate
descent on both larger candidates until no entry of the whole matrix moves any more. lam spans the
published settings; with weights of sigma 0.02, lam*sigma is 0.005 to 0.4.
"""

from __future__ import annotations

import torch
from harness_one_pass import OnePass, main
from torch import Tensor

from proxsparse import ops
from proxsparse.ops import reference


def published_prox(z: Tensor, lam: float, tolerance: float = 1e-6, max_sweeps: int = 100) -> Tensor:
    """EnumALM of [N, K]; a host synchronisation a sweep, by its stop test over the matrix."""
    magnitude, order = z.float().abs().reshape(-1, 4).sort(dim=-1, descending=True)
    best = magnitude.clone()
    best[:, 2:] = 0
    lowest = magnitude[:, 2:].square().sum(-1) / 2
    for entries in (3, 4):
        w = magnitude.clone()
        w[:, entries:] = 0
        for _ in range(max_sweeps):
            previous = w.clone()
            for i in range(entries):
                j, k, m = (w[:, other] for other in range(4) if other != i)
                w[:, i] = (magnitude[:, i] - lam * (j * k + k * m + m * j)).clamp_min(0)
            if (w - previous).abs().max() < tolerance:
                break
        objective = (w - magnitude).square().sum(-1) / 2
        objective += lam * reference.regularizer_2to4(w)[:, 0]
        best = torch.where((objective < lowest)[:, None], w, best)
        lowest = torch.minimum(objective, lowest)
    w = torch.empty_like(best).scatter_(-1, order, best)
    return (w.reshape(z.shape) * z.sign()).to(z.dtype)


def check(z: Tensor, lam: float) -> None:
    """The objective must be as low as the reference's in float64, up to z's rounding."""
    exact = z.double()

    def objective(w: Tensor) -> Tensor:
        groups = (w.double() - exact).square().reshape(-1, 4).sum(-1) / 2
        return groups + lam * reference.regularizer_2to4(w.double()).reshape(-1)

    limit = objective(reference.prox_2to4(exact, lam).to(z.dtype))
    rounding = torch.finfo(z.dtype).eps * exact.square().reshape(-1, 4).sum(-1)
    assert (objective(ops.prox_2to4(z, lam)) <= limit + rounding).all(), f"wrong prox, lam {lam}"


if __name__ == "__main__":
    main(
        OnePass(
            name="prox_2to4",
            run=ops.prox_2to4,
            settings={f"lam {lam}": lam for lam in (0.25, 2.5, 20.0)},
            num_bytes=lambda z: 2 * z.nbytes,
            check=check,
            baseline=("published, eager", "vs_published_prox_min"),
            run_baseline=published_prox,
        )
    )
