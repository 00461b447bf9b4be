"""Writes the tables of measured figures into README.md and docs/speed.md, from the results here.

    python benchmarks/make_tables.py [--check]

A table stands between `<!-- table NAME -->` and `<!-- end -->`, below a line that names its card,
date and commit. Run this, and plot_readme.py, when a JSON file has changed; tests/test_documents.py
holds that both documents show what the files say.
"""

from __future__ import annotations

import argparse
import collections
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from plot_readme import NAMES, RESULTS, ROOT, by_tokens, read, split

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "speed.md")
LARGE = 50e6  # bytes of a dense weight that fills a GPU while it decodes
DECODE_SHAPES = (
    *("1024x4096", "4096x4096", "14336x4096", "4096x14336", "28672x8192", "8192x28672"),
    *("18944x3584", "3584x18944"),
)
PREFILL_SHAPES = (
    *("512x3584", "1024x4096", "4096x4096", "14336x4096", "4096x14336", "28672x8192"),
    *("8192x28672", "5120x5120"),
)
QUALITY = {"mask_quality": "22 M Llama", "mask_quality_smollm2": "SmolLM2-135M"}
WHAT = ("held-out", "WikiText-2", "loss left")
_BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def origin(*results: dict[str, Any]) -> str:
    """Card, date and commit of each result, those that agree named once."""
    places = (f"{r['device']}, {r['date']}, commit {r['commit']}" for r in results)
    return "; ".join(dict.fromkeys(places))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def quality() -> list[str]:
    """Perplexity by method, of a model made for this and of a pretrained one."""
    results = [read(RESULTS / "h100" / f"{name}.json") for name in QUALITY]
    rows = []
    for name, words in NAMES.items():
        found = [result["summary"].get(name) for result in results]
        if not any(found):
            continue
        cells = [words]
        for figures in found:
            cells += _quality_of(figures, name)
        rows.append([f"**{cell}**" if cell else "" for cell in cells] if name == "gates" else cells)
    header = ("method", *(f"{model}: {what}" for model in QUALITY.values() for what in WHAT))
    return [f"{origin(*results)}:", "", *table(header, rows)]


def _quality_of(figures: dict[str, Any] | None, name: str) -> list[str]:
    if figures is None:
        return ["", "", ""]
    left = [f"{100 * figures[f'left_{text}']:.0f}%" for text in ("heldout", "wikitext2")]
    share = "" if name == "dense" else " / ".join(left)
    return [f"{figures['heldout']:.1f}", f"{figures['wikitext2']:.1f}", share]


def model() -> list[str]:
    """Prefill and decode of a whole model."""
    result = read(RESULTS / "h200" / "model.json")
    found = {(r["case"], r["batch"], r["weights"]): r for r in result["rows"]}
    summary = result["summary"]
    rows = []
    for case, batch, weights in found:
        if weights != "dense":
            continue
        pair = [found[case, batch, kind] for kind in ("dense", "sparse")]
        if case == "prefill":
            words = f"prefill, {pair[0]['tokens']} tokens"
            figures = [f"{r['ms_p50']:.1f} ms" for r in pair]
            gain, limit = summary["prefill_speedup"], ""
        else:
            words = f"decode, batch {batch}"
            figures = [f"{r['tokens_per_s']:.0f} tokens/s" for r in pair]
            gain, limit = summary[f"decode_speedup_b{batch}"], summary[f"decode_limit_b{batch}"]
        rows.append([words, *figures, f"{gain:.2f}", f"{limit:.2f}" if limit else ""])
    sizes = [f"{result['weight_bytes'][kind] / 1e9:.1f} GB" for kind in ("dense", "sparse")]
    rows.append(["weights", *sizes, f"{1 / summary['weight_memory_ratio']:.2f}", ""])
    header = ("", "dense", "sparse", "times", "the bytes allow")
    return [f"{origin(result)}:", "", *table(header, rows)]


def decode() -> list[str]:
    """A layer at few tokens."""
    result = read(RESULTS / "h200" / "sparse_linear_decode.json")
    speedups: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for row in result["rows"]:
        if row["backend"] == "cuda chosen":
            shape, tokens = row["case"].removesuffix(" tokens").split(", ")
            speedups[shape][int(tokens)] = row["speedup"]
    large = [s for s in speedups if 2 * math.prod(map(int, s.split("x"))) >= LARGE]
    counts = (1, 8, 16, 32, 64)
    rows = [_row(shape, [speedups[shape][m] for m in counts]) for shape in DECODE_SHAPES]
    means = [statistics.geometric_mean(speedups[s][m] for s in large) for m in counts]
    rows.append(_row(f"mean of {len(large)} layers of 50 MB and more", means))
    return [f"{origin(result)}:", "", *table(("N x K", *(f"M = {m}" for m in counts)), rows)]


def prefill() -> list[str]:
    """A layer at many tokens, after tuning."""
    result = read(RESULTS / "h200" / "sparse_linear.json")
    whole, _ = split(by_tokens(result["rows"], "proxsparse"))
    counts = [m for m in whole if m >= 256]
    one = {
        (row["case"].split()[0], row["tokens"]): row["speedup"]
        for row in result["rows"]
        if (row["backend"], row["mode"]) == ("proxsparse", "graph")
    }
    rows = [_row(shape, [one[shape, m] for m in counts]) for shape in PREFILL_SHAPES]
    means = [statistics.geometric_mean(whole[m]) for m in counts]
    rows.append(_row(f"mean of {len(whole[counts[0]])} layers of five models", means))
    return [f"{origin(result)}:", "", *table(("N x K", *(f"M = {m}" for m in counts)), rows)]


def learning() -> list[str]:
    """Time and memory of 8 billion parameters."""
    lean, gpt = (read(RESULTS / "h200" / f"learn_8b{x}.json") for x in ("", "_sparsegpt"))
    figures = lean["summary"]
    rows = []
    for mode in ("balanced", "low"):
        step, peak = figures[f"{mode}_s_per_step"], figures[f"{mode}_peak_gb"]
        whole = f"{400 * step / 60:.1f} min for 400 steps"
        rows.append([f"gates, `--memory {mode}`", f"{step:.2f}", f"{peak:.0f} GB", whole])
    for name, result in (("SparseGPT", gpt), ("Wanda", lean), ("magnitude", lean)):
        summary, settings, key = result["summary"], result["settings"], name.lower()
        seconds, peak = summary[f"{key}_seconds"], summary[f"{key}_peak_gb"]
        blocks = f", {settings['samples']} blocks of {settings['sample_length']}"
        blocks = "" if name == "magnitude" else blocks
        rows.append([f"{name}{blocks}", "", f"{peak:.0f} GB", f"{seconds:.1f} s"])
    header = ("", "seconds a step", "peak memory", "in all")
    return [f"{origin(lean, gpt)}:", "", *table(header, rows)]


def cpu() -> list[str]:
    """The fused updates on a CPU."""
    results = {op: read(RESULTS / "cpu" / f"{op}.json") for op in ("prox_adamw", "gate_update")}
    rows = []
    for op, result in results.items():
        cases: dict[str, dict[str, float]] = collections.defaultdict(dict)
        for row in result["rows"]:
            cases[row["case"]][row["backend"].split(", ")[-1]] = row["us_p50"]
        for case, times in cases.items():
            ours, adamw = times["cpu"], times["fused"]
            cells = (f"{x:.1f} ms" for x in (ours / 1e3, adamw / 1e3))
            rows.append([f"`{op}_`, lam {case.split()[-1]}", *cells, f"{ours / adamw:.1f}",
                         f"{times['eager reference'] / ours:.0f}"])  # fmt: skip
    header = ("step", "time", "AdamW alone", "times AdamW alone", "faster than the eager reference")
    return [f"{origin(*results.values())}:", "", *table(header, rows)]


def _row(shape: str, speedups: Iterable[float]) -> list[str]:
    return [shape.replace("x", " x ") if shape[0].isdigit() else shape] + [
        f"{speedup:.2f}" for speedup in speedups
    ]


TABLES: dict[str, Callable[[], list[str]]] = {
    function.__name__: function for function in (quality, model, decode, prefill, learning, cpu)
}


def fill(text: str) -> str:
    """A document with its tables written anew."""

    def write(found: re.Match[str]) -> str:
        return found[1] + "\n".join(TABLES[found[2]]()) + "\n" + found[3]

    return _BLOCK.sub(write, text)


def main() -> None:
    """Write the tables, or say which document is stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one is stale")
    args = parser.parse_args()
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        if args.check and fill(text) != text:
            sys.exit(f"{path.name} is stale: run python benchmarks/make_tables.py")
        if not args.check:
            path.write_text(fill(text), encoding="utf-8")


if __name__ == "__main__":
    main()
