"""The fused AdamW + 2:4 prox against the eager reference and against AdamW alone.

    python benchmarks/bench_prox_adamw.py [--log2-size 24] [--dtype bfloat16] [--quick] [--out DIR]

The baseline of every row is `torch.optim.AdamW(fused=True)` on the same tensors, which does less:
it has no prox. The eager reference is timed once per case, since it is slow.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from harness import (
    Row,
    copy_bandwidth,
    pick_device,
    print_roofline,
    time_interleaved,
    time_once,
    write_results,
)
from torch import Tensor

from proxsparse import ops, reference

IN_FEATURES = 4096
LAMBDAS = (0.005, 0.05, 0.5)  # times sigma, which is 1 here
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FAST = {"cpu": "cpu", "cuda": "triton"}
# Of weight and gradient, and of the states, on each device.
MEASURED = {
    "cpu": [("float32", "float32")],
    "cuda": [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")],
}
SETTINGS = {"step": 10.0, "lr": 1e-4, "weight_decay": 0.01}


def make_tensors(
    size: int, dtype: torch.dtype, states: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Parameters of sigma 1, a gradient, and moments that fit."""
    shape = (size // IN_FEATURES, IN_FEATURES)
    grad = 1e-3 * torch.randn(shape, device=device)
    moments = [grad * 0.1 + 1e-4 * torch.randn_like(grad), 1e-6 * torch.rand_like(grad)]
    p = torch.randn(shape, device=device, dtype=dtype)
    return [p, grad.to(dtype), *(x.to(states) for x in moments)]


def check(fast: str, device: torch.device) -> None:
    """Refuses to time a backend that is wrong: float64 decides, on 2^18 parameters."""
    for lam in LAMBDAS:
        p, grad, m, v = make_tensors(2**18, torch.float32, torch.float32, device)
        moved = [x.double() for x in (p, grad, m, v)]
        with ops.use_backend("reference"):
            ops.prox_adamw_(*moved, **SETTINGS, lam=0.0)
        with ops.use_backend(fast):
            ops.prox_adamw_(p, grad, m, v, **SETTINGS, lam=lam)
        torch.testing.assert_close(m.double(), moved[2], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(v.double(), moved[3], rtol=1e-5, atol=1e-12)
        z, best = moved[0], reference.prox_2to4(moved[0], lam)
        excess = objective(p.double(), z, lam) - objective(best, z, lam)
        assert (excess <= 1e-6 * z.square().reshape(-1, 4).sum(-1)).all(), f"wrong prox, lam {lam}"
    print(f"correct: {fast} meets the float64 objective for lam*sigma in {LAMBDAS}")


def objective(w: Tensor, z: Tensor, lam: float) -> Tensor:
    """1/2 ||w - z||^2 + lam*R(w) of each group."""
    distance = (w - z).square().reshape(-1, 4).sum(-1) / 2
    return distance + lam * reference.regularizer_2to4(w).reshape(-1)


def time_dtypes(
    dtype: str, states: str, size: int, device: torch.device, rounds: int, bandwidth: float
) -> list[Row]:
    """Three rows for each lam: AdamW alone, the fused update, its eager reference."""
    fast = FAST[device.type]
    p, grad, m, v = make_tensors(size, DTYPES[dtype], DTYPES[states], device)
    start = p.clone()
    parameter = torch.nn.Parameter(p.clone())
    parameter.grad = grad
    adamw = torch.optim.AdamW([parameter], lr=1e-4, fused=True)

    num_bytes = p.numel() * (3 * p.itemsize + 4 * m.itemsize)
    print(f"{dtype}, {states} states")
    print_roofline(num_bytes, bandwidth)
    adamw_bytes = p.numel() * 7 * p.itemsize  # its moments have the dtype of the weight
    rows: list[Row] = []
    for lam in LAMBDAS:

        def update(backend: str, lam: float = lam) -> None:
            with ops.use_backend(backend):
                ops.prox_adamw_(p, grad, m, v, **SETTINGS, lam=lam)

        case = f"{dtype}, {states} states, lam*sigma {lam}"
        base_seconds, seconds = time_interleaved(
            [adamw.step, lambda: update(fast)], lambda: p.copy_(start), device, rounds
        )
        base = Row(case, "AdamW alone, fused", base_seconds, adamw_bytes)
        p.copy_(start)
        eager = [time_once(lambda: update("reference"), device)]
        rows += [
            base,
            Row(case, f"AdamW + prox, {fast}", seconds, num_bytes, base),
            Row(case, "AdamW + prox, eager reference", eager, num_bytes, base),
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log2-size", type=int, help="parameters; default 28 on a GPU, else 24")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--dtype", choices=DTYPES, help="of weight and gradient (default: several)")
    parser.add_argument("--states", choices=DTYPES, help="of the moments; needs --dtype")
    parser.add_argument("--quick", action="store_true", help="2^20 parameters, 3 rounds")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    device = pick_device()
    args.log2_size = args.log2_size or (28 if device.type == "cuda" else 24)
    if args.quick:
        args.log2_size, args.rounds = 20, 3
    if args.threads:
        torch.set_num_threads(args.threads)
    dtypes = [(args.dtype, args.states or args.dtype)] if args.dtype else MEASURED[device.type]
    torch.manual_seed(0)
    check(FAST[device.type], device)
    size = 2**args.log2_size
    bandwidth = copy_bandwidth(max(8 * size, 2**26), device)
    rows: list[Row] = []
    for dtype, states in dtypes:
        rows += time_dtypes(dtype, states, size, device, args.rounds, bandwidth)
    fused = rows[1::3]
    summary = {
        "vs_fused_adamw_min": min(row.speedup for row in fused),
        "vs_eager_reference_min": min(
            slow.median / row.median for row, slow in zip(fused, rows[2::3], strict=True)
        ),
        "pct_of_limit_min": 100 * min(row.bandwidth for row in fused) / bandwidth,
    }
    settings = {key: str(value) for key, value in vars(args).items() if key != "out"}
    title = f"prox_adamw_, 2^{args.log2_size} parameters"
    write_results("prox_adamw", title, rows, bandwidth, summary, settings, args.out)


if __name__ == "__main__":
    main()
