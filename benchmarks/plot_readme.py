"""The two pictures of the README, drawn from the results in this folder; nothing is measured.

    python benchmarks/plot_readme.py [--results DIR] [--out DIR]

Every figure comes from the JSON files, and each picture names the card, commit and date of its own.
Run it again when those files change.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS, OTHER, INK = "#0b7a75", "#9a9a9a", "#222222"
NAMES = {
    "dense": "dense",
    "gates": "gates (default)",
    "gates_26m": "gates, 26 M tokens",
    "gates_recovered": "gates, then recovery",
    "maskllm": "MaskLLM",
    "sparsegpt": "SparseGPT, updates weights",
    "proxsparse": "ProxSparse (default)",
    "sparsegpt_mask_only": "SparseGPT, mask only",
    "wanda": "Wanda",
    "magnitude": "magnitude",
}


def read(path: Path) -> dict[str, Any]:
    """A result file."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def origin(result: dict[str, Any]) -> str:
    """Where and when a result was measured, in words."""
    return f"{result['device']}, commit {result['commit']}, {result['date']}"


def by_tokens(rows: list[dict[str, Any]], backend: str) -> dict[int, list[float]]:
    """Token count -> the speed-up of every layer, replayed from a CUDA graph."""
    found = collections.defaultdict(list)
    for row in rows:
        if (row["backend"], row["mode"]) == (backend, "graph"):
            found[row["tokens"]].append(row["speedup"])
    return dict(sorted(found.items()))


def split(speedups: dict[int, list[float]]) -> tuple[dict[int, list[float]], ...]:
    """Powers of two, which fill the tiles of kernels, and the counts between them."""
    whole = {m: x for m, x in speedups.items() if m & (m - 1) == 0}
    return whole, {m: x for m, x in speedups.items() if m not in whole}


def means(speedups: dict[int, list[float]]) -> list[float]:
    """The geometric mean over layers at each token count."""
    return [statistics.geometric_mean(x) for x in speedups.values()]


def draw_speed(result: dict[str, Any], axis: Axes) -> None:
    """Speed-up over dense by token count: ours, PyTorch's, and the range of our layers."""
    whole, between = split(by_tokens(result["rows"], "proxsparse"))
    torch, _ = split(by_tokens(result["rows"], "torch"))
    tokens = list(whole)
    low, high = zip(*((min(x), max(x)) for x in whole.values()), strict=True)
    axis.fill_between(tokens, low, high, color=OURS, alpha=0.12, linewidth=0)
    for speedups, color, style in ((torch, OTHER, "o-"), (whole, OURS, "o-"), (between, OURS, "o")):
        face = "white" if speedups is between else color
        axis.plot(list(speedups), means(speedups), style, color=color, markerfacecolor=face)
    axis.axhline(1, color=INK, linewidth=0.8)

    layers, fewer = (len(next(iter(x.values()))) for x in (whole, between))
    text = f"proxsparse, mean and range of {layers} layers"
    axis.text(1.1, high[0], text, color=OURS, fontsize=9)
    axis.text(1.1, means(torch)[0] + 0.06, "PyTorch's 2:4 path, best algorithm", fontsize=9)
    axis.text(tokens[-1], 1.03, "dense", fontsize=9, ha="right")
    text = f"{', '.join(map(str, between))} tokens, which fill\nno whole tiles ({fewer} layers)"
    last = (list(between)[-1], means(between)[-1])
    line = {"arrowstyle": "-", "color": OURS, "linewidth": 0.7}
    axis.annotate(text, last, (last[0], 0.6), fontsize=9, color=OURS, arrowprops=line, ha="center")
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, list(map(str, tokens)), fontsize=8)
    axis.set_yticks([0, 0.5, 1, 1.5, 2])
    axis.set_ylim(0, 1.12 * max(high))
    axis.set(xlabel="tokens in a call", ylabel="times as fast as dense")


def draw_quality(result: dict[str, Any], axis: Axes) -> None:
    """Held-out perplexity of each method, the best first."""
    summary = result["summary"]
    names = sorted((n for n in NAMES if n in summary), key=lambda n: summary[n]["heldout"])
    values = [summary[name]["heldout"] for name in names]
    colors = [{"gates": OURS, "dense": INK}.get(name, OTHER) for name in names]
    bars = axis.barh([NAMES[name] for name in names], values, color=colors, height=0.65)
    axis.bar_label(bars, fmt="%.1f", padding=4, fontsize=9)
    axis.axvline(summary["dense"]["heldout"], color=INK, linewidth=0.8, linestyle="dotted")
    axis.invert_yaxis()
    axis.set(xlabel="held-out perplexity at 2:4 (lower is better)")
    axis.set_xlim(right=1.1 * max(values))
    axis.tick_params(axis="y", length=0)


def save(
    result: dict[str, Any], draw: Any, title: str, size: tuple[float, float], to: Path
) -> None:
    """One picture on a light ground, small enough for a README."""
    figure = Figure(figsize=size, layout="constrained", dpi=110, facecolor="white")
    axis = figure.subplots()
    draw(result, axis)
    axis.set_title(f"{title}\n", fontsize=10, loc="left", color=INK)
    axis.text(0, 1.02, origin(result), transform=axis.transAxes, fontsize=8, color="#6a6a6a")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, metadata={"Software": None})


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    speed = read(args.results / "h200" / "sparse_linear.json")
    quality = read(args.results / "h100" / "mask_quality_smollm2.json")
    title = f"A linear layer after tuning, {speed['settings']['dtype']}"
    save(speed, draw_speed, title, (7.2, 3.6), args.out / "speed.png")
    title = "SmolLM2-135M-Instruct, 1.6 M tokens"
    save(quality, draw_quality, title, (7.2, 2.1), args.out / "quality.png")


if __name__ == "__main__":
    main()
