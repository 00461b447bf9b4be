"""What a step of the learned methods costs on a GPU, and whether the GPU or the host sets its pace.

    python benchmarks/bench_learn_step.py --model DIR --data DIR [--method gates] [--steps N]

DATA holds calibration.txt. The loop runs as users run it, once with its steps as CUDA graphs and
once with eager ones, from the same seed; the masks of both are compared first. Twenty steps warm up
(and record the graph); N are timed by the wall clock, looks at the metrics included; 20 more run
under torch's profiler, for the time in which the GPU is busy and the kernels that fill it. On a CPU
there is only the wall clock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_learn_modes import agreement
from harness import describe_run, pick_device, results_directory, show_log
from torch.autograd import DeviceType

from proxsparse.data.sources import read_text
from proxsparse.data.tokenizing import to_blocks, tokenize_text
from proxsparse.jobs.recipe import make_recipe
from proxsparse.learning import loop as learn
from proxsparse.learning.job import Job
from proxsparse.models.loading import load_model
from proxsparse.models.masks import Masks
from proxsparse.models.precision import computing_in
from proxsparse.models.targets import find_targets

LOOK = 10  # steps between the loop's looks at its metrics, which is when it can be timed
WARM_UP, PROFILED = 2 * LOOK, 2 * LOOK
UPDATES = ("gate_update", "prox_adamw", "gate_project")
SAME = 0.9  # of the mask decisions: attention's backward pass sums in another order each time


class Stopwatch:
    """Called at each look, when the GPU has done all steps so far: times some, profiles others."""

    def __init__(self, timed: int, device: torch.device) -> None:
        self.last_timed = WARM_UP + timed
        self.began = time.perf_counter()
        self.at: dict[int, float] = {}
        self.profiler: Any = None
        if device.type == "cuda":
            activities = [torch.profiler.ProfilerActivity.CUDA]
            self.profiler = torch.profiler.profile(activities=activities)

    def __call__(self, record: dict[str, float]) -> None:
        """Take note of the moment; start or stop the profiler."""
        step = int(record["step"])
        self.at[step] = time.perf_counter() - self.began
        if self.profiler is not None and step == self.last_timed:
            self.profiler.start()
        if self.profiler is not None and step == self.last_timed + PROFILED:
            torch.cuda.synchronize()
            self.profiler.stop()

    def figures(self) -> dict[str, float]:
        """Milliseconds per step, of the wall clock and of the GPU; shares of updates and host."""
        wall = (self.at[self.last_timed] - self.at[WARM_UP]) / (self.last_timed - WARM_UP)
        figures = {"first_steps_s": self.at[WARM_UP], "ms_per_step": 1e3 * wall}
        events = self.profiler.events() if self.profiler is not None else []
        if kernels := [e for e in events if e.device_type == DeviceType.CUDA]:
            busy = busy_us(kernels) / PROFILED
            updates = busy_us([e for e in kernels if any(u in e.name for u in UPDATES)]) / PROFILED
            figures |= {
                "gpu_ms_per_step": busy / 1e3,
                "update_ms_per_step": updates / 1e3,
                "forward_backward_ms_per_step": (busy - updates) / 1e3,
                "kernels_per_step": len(kernels) / PROFILED,
                "update_share": updates / busy,
                "host_share": max(0.0, 1 - busy / (1e6 * wall)),
            }
        return figures


def busy_us(events: list[Any]) -> float:
    """Microseconds in which at least one of the events runs."""
    total = end = 0.0
    for span in sorted((e.time_range for e in events), key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return total


@contextlib.contextmanager
def launching(mode: str) -> Iterator[None]:
    """Let the loop run its steps as it would ("graph") or all of them kernel by kernel."""
    if mode == "graph":
        yield
        return
    with mock.patch.object(learn, "as_graph", lambda step, device: contextlib.nullcontext(step)):
        yield


def main() -> None:
    """Measure every method both ways; the file is written at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a dense causal LM")
    parser.add_argument("--data", required=True, type=Path, help="directory of calibration.txt")
    parser.add_argument(
        "--method", nargs="*", default=["gates"], choices=["gates", "proxsparse"], dest="methods"
    )
    parser.add_argument("--steps", type=int, default=100, help="timed steps, in tens")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/<gpu>")
    args = parser.parse_args()
    timed = max(LOOK, args.steps // LOOK * LOOK)

    show_log()  # says why, if a step cannot be a graph
    device = pick_device()
    base = load_model(args.model, device)
    targets = find_targets(base.model)
    text = read_text(args.data / "calibration.txt")
    blocks = to_blocks(tokenize_text(text, base.tokenizer), args.max_seq_length)
    rows: list[dict[str, Any]] = []
    masks: dict[str, Masks] = {}
    for method in args.methods:
        for mode in ("graph", "eager") if device.type == "cuda" else ("eager",):
            recipe = make_recipe(
                method,
                memory="fast",
                steps=WARM_UP + timed + PROFILED,
                batch_size=args.batch_size,
                max_seq_length=args.max_seq_length,
                checkpoint_every=0,
            )
            draw = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
            with computing_in(base.model, torch.float32), launching(mode):
                watch = Stopwatch(timed, device)
                tokens = blocks[draw[: recipe.num_samples]]
                job = Job(base.model, targets, tokens, recipe.learn, recipe.options, track=watch)
                masks[mode] = recipe.method.run(job)
            figures = {key: round(value, 4) for key, value in watch.figures().items()}
            rows.append({"method": method, "mode": mode, **figures})
        if len(masks) == 2:
            same = agreement(masks["graph"], masks["eager"])
            print(f"{method}: {same:.2%} of the mask decisions are the same as graph and eager")
            if same < SAME:
                raise SystemExit(f"less than {SAME:.0%}: no figures")
        for row in rows[-len(masks) :]:
            print(row, flush=True)

    first = {row["mode"]: row for row in rows if row["method"] == args.methods[0]}
    best = first.get("graph", first["eager"])
    summary = {
        "seconds_400_steps": round(0.4 * best["ms_per_step"], 2),
        "ms_per_step": best["ms_per_step"],
        "ms_per_step_eager": first["eager"]["ms_per_step"],
    }
    names = ("gpu_ms_per_step", "update_share", "host_share")
    summary |= {name: best[name] for name in names if name in best}
    result = {
        **describe_run(),
        "settings": {
            **vars(args),
            "model": Path(args.model).name,
            "data": args.data.name,
            "out": None,
            "steps": timed,
        },
        "summary": summary,
        "rows": rows,
    }
    out = args.out or results_directory()
    out.mkdir(parents=True, exist_ok=True)
    (out / "learn_step.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
