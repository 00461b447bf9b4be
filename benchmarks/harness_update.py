"""What bench_{prox_adamw,gate_update}.py run: a fused optimiser step against AdamW alone.

The baseline of every row is `torch.optim.AdamW(fused=True)` on tensors of the same size and dtype,
which does less: it has no prox. Its moments have the dtype of the weight, so rows with other states
compare what is not alike, and the summary leaves them out. The eager reference is timed once per
case, since it is slow, on at most 2^24 parameters, since it takes many times their memory; its time
is scaled to the full size.

On a CPU set OMP_WAIT_POLICY=passive. torch and our extension each bring an OpenMP runtime, whose
idle threads otherwise spin on the cores that the other one's need, and now and then a row doubles.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from proxsparse import ops
from proxsparse.ops import dispatch, reference

IN_FEATURES = 4096
MAX_EAGER = 2**24
LAMBDAS = (0.005, 0.05, 0.5)  # times sigma, which is 1 here
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FAST = {"cpu": "cpu", "cuda": "triton"}
# Of weight and gradient, and of the states, on each device.
MEASURED = {
    "cpu": [("float32", "float32")],
    "cuda": [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")],
}


@dataclass(frozen=True)
class FusedUpdate:
    """An update under test.

    Attributes:
        stem: of the op, whose name ends in "_".
        make_tensors: (size, dtype, dtype of the states, device) -> the op's tensors, what is
            updated first and its gradient second.
        check: raises unless what a step has done is right: (tensors after it with lam, the same in
            float64 after a reference step without a prox, lam).
        settings: the op's other arguments, lam apart.
        num_weights: tensors of the weight's dtype that move, read or written.
        num_states: the same of the states' dtype.
    """

    stem: str
    make_tensors: Callable[[int, torch.dtype, torch.dtype, torch.device], list[Tensor]]
    check: Callable[[list[Tensor], list[Tensor], float], None]
    settings: dict[str, Any]
    num_weights: int
    num_states: int

    def run(self, backend: str, tensors: list[Tensor], lam: float) -> None:
        """One step."""
        with dispatch.use_backend(backend):
            getattr(ops, f"{self.stem}_")(*tensors, **self.settings, lam=lam)

    def num_bytes(self, size: int, dtype: str, states: str) -> int:
        """Bytes that must move in a step."""
        weights = self.num_weights * DTYPES[dtype].itemsize
        return size * (weights + self.num_states * DTYPES[states].itemsize)


def check_prox(w: Tensor, z: Tensor, lam: float, scale: Tensor | float = 1.0) -> None:
    """Raises unless the objective of w is the least there is, within 1e-6 of `scale`."""

    def objective(x: Tensor) -> Tensor:
        distance = (x - z).square().reshape(-1, 4).sum(-1) / 2
        return distance + lam * reference.regularizer_2to4(x).reshape(-1)

    excess = objective(w.double()) - objective(reference.prox_2to4(z, lam))
    assert (excess <= 1e-6 * scale).all(), f"wrong prox, lam {lam}"


def check_update(update: FusedUpdate, fast: str, device: torch.device) -> None:
    """Refuses to time a backend that is wrong: float64 decides, on 2^18 parameters."""
    for lam in LAMBDAS:
        tensors = update.make_tensors(2**18, torch.float32, torch.float32, device)
        moved = [x.double() for x in tensors]
        update.run("reference", moved, 0.0)
        update.run(fast, tensors, lam)
        update.check(tensors, moved, lam)
    print(f"correct: {fast} meets the float64 objective for lam*sigma in {LAMBDAS}")


def time_dtypes(
    update: FusedUpdate,
    dtype: str,
    states: str,
    size: int,
    device: torch.device,
    rounds: int,
    bandwidth: float,
) -> list[Row]:
    """Three rows for each lam: AdamW alone, the fused update, its eager reference."""
    fast = FAST[device.type]
    tensors = update.make_tensors(size, DTYPES[dtype], DTYPES[states], device)
    first, grad = tensors[:2]
    start = first.clone()
    parameter = torch.nn.Parameter(torch.randn_like(grad))
    parameter.grad = grad
    adamw = torch.optim.AdamW([parameter], lr=1e-4, fused=True)
    adamw_bytes = size * 7 * grad.itemsize  # its moments have the dtype of the weight
    num_bytes = update.num_bytes(size, dtype, states)
    print(f"{dtype}, {states} states")
    print_roofline(num_bytes, bandwidth)
    few = [x[: MAX_EAGER // IN_FEATURES] if len(x) == len(first) else x for x in tensors]
    rows: list[Row] = []
    for lam in LAMBDAS:

        def step(lam: float = lam) -> None:
            update.run(fast, tensors, lam)

        def eager_step(lam: float = lam) -> None:
            update.run("reference", few, lam)

        case = f"{dtype}, {states} states, lam*sigma {lam}"
        base_seconds, seconds = time_interleaved(
            [adamw.step, step], lambda: first.copy_(start), device, rounds
        )
        base = Row(case, "AdamW alone, fused", base_seconds, adamw_bytes)
        first.copy_(start)
        eager = [time_once(eager_step, device) * size / few[0].numel()]
        rows += [
            base,
            Row(case, f"{update.stem}_, {fast}", seconds, num_bytes, base),
            Row(case, f"{update.stem}_, eager reference", eager, num_bytes, base),
        ]
    return rows


def main(update: FusedUpdate) -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(description=f"{update.stem}_ against AdamW alone")
    parser.add_argument("--log2-size", type=int, help="parameters; default 28 on a GPU, else 24")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--dtype", choices=DTYPES, help="of weight and gradient (default: several)")
    parser.add_argument("--states", choices=DTYPES, help="of the states; needs --dtype")
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
    check_update(update, FAST[device.type], device)
    size = 2**args.log2_size
    bandwidth = copy_bandwidth(max(8 * size, 2**26), device)
    rows: list[Row] = []
    for dtype, states in dtypes:
        rows += time_dtypes(update, dtype, states, size, device, args.rounds, bandwidth)
    fused = rows[1::3]
    alike = [dtype == states for dtype, states in dtypes for _ in LAMBDAS]
    summary = {
        # AdamW's moments have the dtype of the weight: against others it moves fewer bytes.
        "vs_fused_adamw_min": min(
            (row.speedup for row, same in zip(fused, alike, strict=True) if same), default=math.nan
        ),
        "vs_eager_reference_min": min(
            slow.median / row.median for row, slow in zip(fused, rows[2::3], strict=True)
        ),
        "pct_of_limit_min": 100 * min(row.bandwidth for row in fused) / bandwidth,
    }
    settings = {key: str(value) for key, value in vars(args).items() if key != "out"}
    title = f"{update.stem}_, 2^{args.log2_size} parameters"
    write_results(update.stem, title, rows, bandwidth, summary, settings, args.out)
