"""The fused AdamW + 2:4 prox against the eager reference and against AdamW alone.

python benchmarks/bench_prox_adamw.py [--log2-size 24] [--dtype bfloat16] [--quick] [--out DIR]
"""

from __future__ import annotations

import torch
from harness_update import IN_FEATURES, FusedUpdate, check_prox, main
from torch import Tensor


def make_tensors(
    size: int, dtype: torch.dtype, states: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Parameters of sigma 1, a gradient, and moments that fit."""
    shape = (size // IN_FEATURES, IN_FEATURES)
    grad = 1e-3 * torch.randn(shape, device=device)
    moments = [grad * 0.1 + 1e-4 * torch.randn_like(grad), 1e-6 * torch.rand_like(grad)]
    p = torch.randn(shape, device=device, dtype=dtype)
    return [p, grad.to(dtype), *(x.to(states) for x in moments)]


def check(tensors: list[Tensor], moved: list[Tensor], lam: float) -> None:
    """The moments are those of float64, the parameters solve the prox of what AdamW makes."""
    p, _, m, v = tensors
    torch.testing.assert_close(m.double(), moved[2], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(v.double(), moved[3], rtol=1e-5, atol=1e-12)
    check_prox(p, moved[0], lam, moved[0].square().reshape(-1, 4).sum(-1))


UPDATE = FusedUpdate(
    stem="prox_adamw",
    make_tensors=make_tensors,
    check=check,
    settings={"step": 10.0, "lr": 1e-4, "weight_decay": 0.01},
    num_weights=3,  # parameters, read and written; gradient
    num_states=4,  # the moments, read and written
)

if __name__ == "__main__":
    main(UPDATE)
