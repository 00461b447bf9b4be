"""What each method's masks are worth: perplexity on two texts the model has not seen.

    python benchmarks/bench_mask_quality.py --model DIR --data DIR [--seeds 1] [--out DIR]

DATA holds calibration.txt, heldout.txt and wikitext2.txt. The learned methods take 400 steps of 8
blocks of 512 tokens drawn at random, the layer-by-layer ones the first 128 blocks; the rows named
`_drawn` show what a random draw of 128 changes. Perplexity is over whole texts cut into blocks of
512, bfloat16 autocast on a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from harness import describe_run, results_directory, show_log

from proxsparse.data.calibration import Calibration
from proxsparse.data.sources import read_text
from proxsparse.data.tokenizing import to_blocks, tokenize_text
from proxsparse.jobs.evaluate import evaluate_perplexity, remaining_loss
from proxsparse.jobs.prune import run_method
from proxsparse.jobs.recipe import make_recipe
from proxsparse.models.loading import load_model, resolve_device
from proxsparse.models.masks import apply_masks_
from proxsparse.models.precision import computing_in
from proxsparse.models.targets import find_targets

# name in the table -> method and the settings that differ from its defaults
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "wanda_drawn": ("wanda", {}),
    "sparsegpt_mask_only": ("sparsegpt", {"mask_only": True}),
    "sparsegpt": ("sparsegpt", {}),
    "sparsegpt_drawn": ("sparsegpt", {}),
    "proxsparse": ("proxsparse", {"lr": 1e-4, "lam": 0.1}),
    "gates": ("gates", {}),
}
TEXTS = ("heldout", "wikitext2")


def _draw(blocks: torch.Tensor, seed: int) -> torch.Tensor:
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]


def _as_calibration(blocks: torch.Tensor) -> Calibration:
    return Calibration(blocks, "calibration.txt", blocks.numel(), blocks.numel(), "")


def summarize(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Method -> perplexities, seconds, share of Wanda's loss that remains; seeds averaged."""
    summary: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        summary[name] = {
            key: round(sum(row[key] for row in mine) / len(mine), 3) for key in (*TEXTS, "seconds")
        }
    if "wanda" in summary:
        dense, wanda = summary["dense"]["heldout"], summary["wanda"]["heldout"]
        for figures in summary.values():
            figures["remaining_loss"] = round(remaining_loss(figures["heldout"], dense, wanda), 3)
    return summary


def write(rows: list[dict[str, Any]], steps: int, out: Path) -> None:
    """Write mask_quality.json; called after each row, so that a long run can be watched."""
    result = {**describe_run(), "steps": steps, "summary": summarize(rows), "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "mask_quality.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Measure every method and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a dense causal LM")
    parser.add_argument("--data", required=True, type=Path, help="directory of the three texts")
    parser.add_argument("--methods", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", type=int, default=1, help="seeds for the learned methods")
    parser.add_argument("--steps", type=int, default=400, help="steps of the learned methods")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/<gpu>")
    args = parser.parse_args()
    show_log()

    base = load_model(args.model, resolve_device(args.device))
    model, tokenizer = base.model, base.tokenizer
    targets = find_targets(model)
    texts = {
        name: to_blocks(tokenize_text(read_text(args.data / f"{name}.txt"), tokenizer), 512)
        for name in TEXTS
    }
    text = read_text(args.data / "calibration.txt")
    calibration = to_blocks(tokenize_text(text, tokenizer), 512)
    rows: list[dict[str, Any]] = []
    with computing_in(model, torch.float32):
        original = {t.name: t.weight().clone() for t in targets.layers}

        def report(name: str, seed: int, seconds: float) -> None:
            perplexity = {
                text: evaluate_perplexity(model, blocks, batch_size=64)
                for text, blocks in texts.items()
            }
            rows.append({"method": name, "seed": seed, "seconds": round(seconds, 2), **perplexity})
            figures = "  ".join(f"{k} {v:8.3f}" for k, v in perplexity.items())
            print(f"{name:20} seed {seed}  {figures}  {seconds:6.1f} s", flush=True)
            write(rows, args.steps, args.out or results_directory())

        report("dense", 0, 0.0)
        for name in args.methods:
            method, settings = RUNS[name]
            learned = method in ("gates", "proxsparse")
            for seed in range(args.seeds if learned else 1):
                extra: dict[str, Any] = {} if method == "magnitude" else {"seed": seed}
                if learned:
                    extra["steps"] = args.steps
                recipe = make_recipe(method, **settings, **extra)
                drawn = learned or name.endswith("_drawn")
                tokens = _draw(calibration, seed) if drawn else calibration
                data = _as_calibration(tokens[: recipe.num_samples])
                began = time.perf_counter()
                masks, _ = run_method(model, targets, data, recipe)
                seconds = time.perf_counter() - began
                apply_masks_(model, masks)
                report(name, seed, seconds)
                for target in targets.layers:
                    target.set_weight_(original[target.name])
    print(json.dumps(summarize(rows)))


if __name__ == "__main__":
    main()
