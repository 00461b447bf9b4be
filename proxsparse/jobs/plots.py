"""The pictures: how a run went, and what the methods are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_INK, _MUTED, _ACCENT = "#1f2933", "#9aa5b1", "#0b7a75"


def _figure(columns: int, width: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no backend, no global state

    figure = Figure(figsize=(width, 3.6), layout="constrained", dpi=150)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=_INK, labelsize=8)
    return figure, axes


def _draw_share(axis: Any, history: Sequence[Mapping[str, float]], label: str, color: str) -> None:
    steps = [record["step"] for record in history]
    axis.plot(steps, [100 * record["share_2to4"] for record in history], color=color, label=label)
    axis.set(xlabel="step", ylim=(0, 102), title="groups that are 2:4 already, %")
    axis.title.set_size(9)


def plot_training(
    history: Sequence[Mapping[str, float]],
    path: Path,
    title: str = "",
    dense_loss: float | None = None,
) -> None:
    """Loss and share of 2:4 groups over the steps, as a PNG.

    Args:
        history: the records of `metrics.jsonl`.
        path: where to.
        title: of the whole picture: model and method.
        dense_loss: a line to compare with: the same loss of the dense model.
    """
    figure, (left, right) = _figure(2, 8)
    figure.suptitle(title, fontsize=10, color=_INK)
    steps = [r["step"] for r in history]
    left.plot(steps, [r["loss"] for r in history], color=_ACCENT)
    if dense_loss is not None:
        left.axhline(dense_loss, color=_MUTED, linewidth=1, linestyle="--")
        left.annotate(
            f"dense model: {dense_loss:.3g}",
            (steps[-1], dense_loss),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=_MUTED,
        )
    left.set(xlabel="step", title="loss, nats per token", ylim=(0, None))
    left.title.set_size(9)
    _draw_share(right, history, "", _ACCENT)
    figure.savefig(path)


def plot_comparison(
    perplexity: Mapping[str, float],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    path: Path,
) -> None:
    """Perplexity of each method as bars, beside the share of 2:4 groups of the learned ones."""
    figure, (left, right) = _figure(2, 9.5)
    names = list(perplexity)
    colors = [_INK if n == "dense" else _ACCENT if n == "gates" else _MUTED for n in names]
    bars = left.bar(names, list(perplexity.values()), color=colors)
    left.bar_label(bars, fmt="%.1f", fontsize=8)
    left.tick_params(axis="x", rotation=25)
    left.set(title="perplexity on held-out text (lower is better)")
    left.title.set_size(9)
    for name, history in histories.items():
        _draw_share(right, history, name, _ACCENT if name == "gates" else _MUTED)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path)
