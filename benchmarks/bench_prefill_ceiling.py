"""How fast `wgmma.sp` can be in a large matrix product, given what shared memory delivers.

    python benchmarks/bench_prefill_ceiling.py [--program FILE] [--out DIR]

Compiles and runs ceiling_wgmma.cu: main loops of a matrix product, dense and 2:4 sparse, with and
without the copies that feed them, on all multiprocessors of a Hopper GPU. Needs nvcc 12 or later,
or the program compiled elsewhere.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from harness import describe_run, results_directory

HERE = Path(__file__).parent
NUMBERS = slice(4, None)  # the columns that are not words


def compile_program(to: Path) -> Path:
    """The program, compiled into this folder."""
    program = to / "ceiling_wgmma"
    include = HERE.parent / "csrc" / "cuda"
    command = ["nvcc", "-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a"]
    sources = [f"-I{include}", str(HERE / "ceiling_wgmma.cu")]
    subprocess.run([*command, *sources, "-o", str(program)], check=True)
    return program


def draw(rows: list[dict[str, str | float]], path: Path) -> None:
    """The share of the peak rate that each case reaches, per clock."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 0.32 * len(rows)), layout="constrained", dpi=150)
    axis = figure.subplots()
    names = [
        f"{row['case']}, {row['rows']} x 256" + (", shared by 2" if row["cluster"] == "2" else "")
        for row in rows
    ]
    bars = axis.barh(names, [float(row["pct_of_peak"]) for row in rows], color="#0b7a75")
    axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axis.set(xlabel="% of the peak products a clock", title="wgmma and wgmma.sp, bfloat16")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def summarize(rows: Sequence[Mapping[str, str | float]]) -> dict[str, float]:
    """The best sustained TFLOP/s of the main loops that also copy, and sparse over dense."""

    def best(kind: str) -> float:
        case = f"{kind}: products and copies"
        return max(float(row["sustained_tflops"]) for row in rows if row["case"] == case)

    dense, sparse = best("dense"), best("sparse")
    return {
        "dense_sustained_tflops": dense,
        "sparse_sustained_tflops": sparse,
        "sustained_speedup_limit": round(sparse / dense, 3),
    }


def main() -> None:
    """Compile, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", type=Path, help="ceiling_wgmma.cu, already compiled")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.exit("this benchmark needs a Hopper GPU")
    with tempfile.TemporaryDirectory() as folder:
        program = args.program or compile_program(Path(folder))
        run = subprocess.run([str(program.resolve())], stdout=subprocess.PIPE, text=True)
    print(run.stdout)
    if run.returncode != 0:
        sys.exit("a case failed, or its sums were wrong")
    header, *table = csv.reader(run.stdout.splitlines())
    rows: list[dict[str, str | float]] = [
        {
            **dict(zip(header, line, strict=True)),
            **dict(zip(header[NUMBERS], map(float, line[NUMBERS]), strict=True)),
        }
        for line in table
    ]
    out = args.out or results_directory()
    out.mkdir(parents=True, exist_ok=True)
    (out / "prefill_ceiling.csv").write_text(run.stdout)
    result = {**describe_run(), "summary": summarize(rows), "rows": rows}
    (out / "prefill_ceiling.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(rows, out / "prefill_ceiling.png")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
