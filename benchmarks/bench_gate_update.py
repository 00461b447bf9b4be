"""The fused gate update against the eager reference and against AdamW alone.

    python benchmarks/bench_gate_update.py [--log2-size 24] [--dtype bfloat16] [--quick] [--out DIR]

AdamW reads one tensor less and has neither prior nor prox. Priors have RMS 1 in each group, so the
scale sigma is 1 by construction.
"""

from __future__ import annotations

import torch
from harness_update import IN_FEATURES, FusedUpdate, check_prox, main
from torch import Tensor

from proxsparse.ops import reference


def make_tensors(
    size: int, dtype: torch.dtype, states: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Gates s, gradient, weight w0, moments and activation norms."""
    shape = (size // IN_FEATURES, IN_FEATURES)
    w0 = torch.randn(shape, device=device)
    grad = 1e-3 * torch.randn_like(w0)
    moments = [1e-4 * torch.randn_like(w0), 1e-6 * torch.rand_like(w0)]
    s = torch.rand_like(w0).to(states)
    norms = torch.rand(IN_FEATURES, device=device) + 0.5
    return [s, grad.to(dtype), w0.to(dtype), *(x.to(states) for x in moments), norms]


def check(tensors: list[Tensor], moved: list[Tensor], lam: float) -> None:
    """The moments are those of float64; the gates, in the metric of the prior, solve the prox."""
    for index in (3, 4):
        torch.testing.assert_close(tensors[index].double(), moved[index], rtol=1e-5, atol=1e-9)
    prior = reference.gate_prior(moved[2], moved[5])
    check_prox(prior * tensors[0].double(), prior * moved[0], lam)


UPDATE = FusedUpdate(
    stem="gate_update",
    make_tensors=make_tensors,
    check=check,
    settings={"step": 10.0, "lr": 0.05},
    num_weights=2,  # w0, gradient
    num_states=6,  # s and the moments, read and written
)

if __name__ == "__main__":
    main(UPDATE)
