"""The 2:4 projection against the eager reference.

python benchmarks/bench_project_2to4.py [--shapes 4096x4096 ...] [--quick] [--out DIR]
"""

from __future__ import annotations

import torch
from harness_one_pass import OnePass, main
from torch import Tensor

from proxsparse import ops
from proxsparse.ops import reference


def check(w: Tensor, _: None) -> None:
    assert torch.equal(ops.project_2to4(w), reference.project_2to4(w)), "wrong projection"


if __name__ == "__main__":
    main(
        OnePass(
            name="project_2to4",
            run=lambda w, _: ops.project_2to4(w),
            settings={"": None},
            num_bytes=lambda w: 2 * w.nbytes,
            check=check,
            baseline=("eager reference", "vs_eager_reference_min"),
            run_baseline=lambda w, _: reference.project_2to4(w),
        )
    )
