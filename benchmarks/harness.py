"""What the benchmarks share: interleaved timing, the memory roofline, and tables on disk.

Every round times each backend of a case once, on the same data, so that a drifting clock or a busy
neighbour hits them alike; medians are compared. Tensors are far larger than any cache, so nothing
is flushed.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class Row:
    """One backend on one case, timed.

    Attributes:
        case: what was run, e.g. "lam*sigma 0.05".
        backend: who ran it.
        seconds: one per round.
        num_bytes: that must move, read and written.
        against: the row that its speed-up is over.
    """

    case: str
    backend: str
    seconds: list[float]
    num_bytes: int
    against: Row | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def speedup(self) -> float:
        """How many times faster than `against`; below 1 is slower."""
        return self.against.median / self.median if self.against else 1.0

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.num_bytes / self.median

    def quantile(self, share: float) -> float:
        """Seconds at this share of the sorted rounds."""
        ordered = sorted(self.seconds)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def pick_device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """The marketing name of the GPU, or of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def results_directory() -> Path:
    """benchmarks/results/<device>, e.g. h200 or cpu."""
    name = "cpu"
    if torch.cuda.is_available():
        name = device_name().lower().removeprefix("nvidia ").split()[0]
    return Path(__file__).parent / "results" / name


def show_log() -> None:
    """Print what the package logs, such as why a step of the loop is not a CUDA graph."""
    log = logging.getLogger("proxsparse")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())


def describe_run() -> dict[str, Any]:
    """Date, device, driver, versions and commit: what a figure needs to be worth keeping."""
    packages = ("proxsparse", "torch", "transformers", "triton")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    # A copy of the tree without its history can be told which commit it is.
    commit = os.environ.get("GIT_COMMIT") or _output(
        "git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"
    )
    return {
        "device": device_name(),
        "driver": driver.partition("\n")[0] or "none",
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "versions": versions,
        "commit": commit or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def time_once(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, on the device's own clock."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The GPU is kept busy while the host queues the call, so that no launch is in the time.
    torch.cuda._sleep(2_000_000)
    before.record()
    run()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3


def time_interleaved(
    runs: Sequence[Callable[[], object]],
    reset: Callable[[], object],
    device: torch.device,
    rounds: int,
) -> list[list[float]]:
    """Seconds of each run in each round, after one round of warm-up.

    Args:
        runs: calls to time, one after the other in each round.
        reset: puts inputs back before each call; not timed.
        device: where they run.
        rounds: how many are kept.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, kept in zip(runs, seconds, strict=True):
            reset()
            kept.append(time_once(run, device))
    return [kept[1:] for kept in seconds]


def copy_bandwidth(num_bytes: int, device: torch.device) -> float:
    """Bytes a second, read and written, of the best of ten copies of this size.

    On a CPU the best of ten additions in place counts when it is higher: a copy there also fetches
    the lines it overwrites, which an update in place does not.
    """
    source: Tensor = torch.zeros(num_bytes // 8, dtype=torch.float32, device=device)
    target = torch.ones_like(source)
    best = min(time_once(lambda: target.copy_(source), device) for _ in range(10))
    bandwidth = 2 * source.numel() * 4 / best
    if device.type == "cpu":
        best = min(time_once(lambda: target.add_(source), device) for _ in range(10))
        bandwidth = max(bandwidth, 3 * source.numel() * 4 / best)
    return bandwidth


def print_roofline(num_bytes: int, bandwidth: float) -> None:
    """The time no implementation can beat, before anything is measured."""
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s (read + written)")
    print(f"limit: {num_bytes / 1e6:.0f} MB must move, {num_bytes / bandwidth * 1e6:.0f} us\n")


def write_results(
    name: str,
    title: str,
    rows: Sequence[Row],
    bandwidth: float,
    summary: dict[str, float],
    settings: dict[str, Any],
    out: Path | None,
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Prints the table and writes it as CSV, PNG and JSON; the last line of stdout is the JSON.

    Args:
        name: stem of the three files.
        title: of the picture.
        rows: in the order of the table.
        bandwidth: the copy bandwidth, bytes a second.
        summary: the figures others will quote.
        settings: sizes and dtypes.
        out: folder; None is `results_directory()`.
        draw: makes the picture; None draws a bar for each row.
    """
    header = (
        "case",
        "backend",
        "us_p50",
        "us_p20",
        "us_p80",
        "gb_per_s",
        "pct_of_limit",
        "speedup",
    )
    table = [
        (
            row.case,
            row.backend,
            *(round(row.quantile(share) * 1e6, 1) for share in (0.5, 0.2, 0.8)),
            round(row.bandwidth / 1e9, 2),
            round(100 * row.bandwidth / bandwidth, 1),
            round(row.speedup, 2),
        )
        for row in rows
    ]
    print("case | backend | us p50 [p20, p80] | GB/s | % of limit | x baseline")
    for case, backend, p50, p20, p80, gigabytes, share, speedup in table:
        line = f"{case} | {backend} | {p50} [{p20}, {p80}] | {gigabytes} | {share} | {speedup}"
        print(line, "SLOWER" if speedup < 1 else "")
    out = out or results_directory()
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *table])
    result = {
        **describe_run(),
        "settings": settings,
        "copy_gb_per_s": round(bandwidth / 1e9, 2),
        "summary": {key: round(value, 3) for key, value in summary.items()},
        "rows": [dict(zip(header, row, strict=True)) for row in table],
    }
    (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    picture = out / f"{name}.png"
    draw(picture) if draw else _draw(title, rows, picture)
    print(json.dumps(result))


def _draw(title: str, rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 0.32 * len(rows)), layout="constrained", dpi=150)
    axis = figure.subplots()
    names = [f"{row.case}  {row.backend}" for row in rows]
    bars = axis.barh(names, [row.median * 1e3 for row in rows], color="#0b7a75")
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axis.set(xscale="log", xlabel="milliseconds (log scale)")
    axis.set_title(title, fontsize=9)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
