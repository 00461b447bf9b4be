"""Packing a 2:4 weight against the eager reference.

    python benchmarks/bench_pack_2to4.py [--shapes 4096x4096 ...] [--quick] [--out DIR]

The registered op is timed: `ops.pack_2to4` first asks whether the weight is 2:4, which reads it
once more and waits for the answer.
"""

from __future__ import annotations

import torch
from harness_one_pass import OnePass, main
from torch import Tensor

from proxsparse import ops
from proxsparse.ops import reference


def check(w: Tensor, _: None) -> None:
    values, codes = ops.pack_2to4(w)
    expected_values, expected_codes = reference.pack_2to4(w)
    assert torch.equal(values, expected_values) and torch.equal(codes, expected_codes), "wrong pack"
    assert torch.equal(ops.unpack_2to4(values, codes), w), "wrong unpack"


if __name__ == "__main__":
    main(
        OnePass(
            name="pack_2to4",
            run=lambda w, _: torch.ops.proxsparse.pack_2to4(w),
            settings={"": None},
            num_bytes=lambda w: w.nbytes + w.nbytes // 2 + w.numel() // 8,
            check=check,
            baseline=("eager reference", "vs_eager_reference_min"),
            run_baseline=lambda w, _: reference.pack_2to4(w),
            prepare=reference.project_2to4,
        )
    )
