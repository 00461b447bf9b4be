"""Which tile suits the update kernels: elements a program and warps, on the GPU at hand.

    python benchmarks/tune_update.py [--log2-size 28] [--rounds 9]

Prints the share of the copy bandwidth of each choice; kernels/launch.py holds the one in use. A
kernel that works in place cannot be tuned while it runs, so this is done by hand.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys

import torch
from bench_gate_update import UPDATE as GATE_UPDATE
from bench_prox_adamw import UPDATE as PROX_ADAMW
from harness import copy_bandwidth, time_interleaved
from harness_update import DTYPES, LAMBDAS, MEASURED

TILES = ((256, 1), (512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log2-size", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_update.py needs a CUDA GPU")
    device, size = torch.device("cuda"), 2**args.log2_size
    bandwidth = copy_bandwidth(8 * size, device)
    print("op | dtype, states | lam | " + " | ".join(f"{b}/{w}" for b, w in TILES))
    for update in (PROX_ADAMW, GATE_UPDATE):
        kernel = importlib.import_module(f"proxsparse.kernels.{update.stem}")
        for dtype, states in MEASURED["cuda"]:
            tensors = update.make_tensors(size, DTYPES[dtype], DTYPES[states], device)
            start = tensors[0].clone()
            num_bytes = update.num_bytes(size, dtype, states)
            for lam in LAMBDAS:
                shares = []
                for kernel.UPDATE_BLOCK, kernel.UPDATE_NUM_WARPS in TILES:
                    (seconds,) = time_interleaved(
                        [lambda: update.run("triton", tensors, lam)],  # noqa: B023
                        lambda: tensors[0].copy_(start),  # noqa: B023
                        device,
                        args.rounds,
                    )
                    shares.append(num_bytes / statistics.median(seconds) / bandwidth)
                cells = " | ".join(f"{100 * share:.1f}" for share in shares)
                print(f"{update.stem} | {dtype}, {states} | {lam} | {cells}", flush=True)


if __name__ == "__main__":
    main()
