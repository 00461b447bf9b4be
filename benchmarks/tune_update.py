"""Which tile suits the update kernels: elements a program and warps, on the GPU at hand.

    python benchmarks/tune_update.py [--log2-size 28] [--rounds 9]

Prints the share of the copy bandwidth of each choice; kernels/launch.py holds the one in use. A
kernel that works in place cannot be tuned while it runs, so this is done by hand.
"""

from __future__ import annotations

import argparse
import importlib
import statistics

import bench_gate_update
import bench_prox_adamw
import torch
from harness import copy_bandwidth, time_interleaved

from proxsparse import ops

TILES = ((1024, 4), (2048, 4), (2048, 8), (512, 4), (4096, 8))
BENCHES = {"prox_adamw": bench_prox_adamw, "gate_update": bench_gate_update}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log2-size", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    device, size = torch.device("cuda"), 2**args.log2_size
    bandwidth = copy_bandwidth(8 * size, device)
    print("op | dtype, states | lam | " + " | ".join(f"{b}/{w}" for b, w in TILES))
    for stem, bench in BENCHES.items():
        kernel = importlib.import_module(f"proxsparse.kernels.{stem}")
        update = getattr(ops, f"{stem}_")
        for dtype, states in bench.MEASURED["cuda"]:
            tensors = bench.make_tensors(size, bench.DTYPES[dtype], bench.DTYPES[states], device)
            first = tensors[0]
            start = first.clone()
            frozen = 3 if stem == "prox_adamw" else 2  # tensors of the weight's dtype that move
            num_bytes = size * (frozen * tensors[1].itemsize)
            num_bytes += size * (4 if stem == "prox_adamw" else 6) * tensors[3].itemsize
            for lam in bench.LAMBDAS:
                shares = []
                for kernel.BLOCK, kernel.NUM_WARPS in TILES:
                    (seconds,) = time_interleaved(
                        [lambda: update(*tensors, **bench.SETTINGS, lam=lam)],  # noqa: B023
                        lambda: first.copy_(start),  # noqa: B023
                        device,
                        args.rounds,
                    )
                    shares.append(num_bytes / statistics.median(seconds) / bandwidth)
                cells = " | ".join(f"{100 * share:.1f}" for share in shares)
                print(f"{stem} | {dtype}, {states} | {lam} | {cells}", flush=True)


if __name__ == "__main__":
    main()
