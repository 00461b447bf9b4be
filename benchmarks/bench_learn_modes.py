"""Whether the lean modes learn what `fast` learns: losses, mask changes and perplexity by seed.

    python benchmarks/bench_learn_modes.py --model DIR --data DIR [--seeds 3] [--out DIR]

DATA holds calibration.txt and heldout.txt. Every mode runs gates from every seed on the same
blocks. The yardstick is `fast` itself: how far apart two of its seeds are, in perplexity and in
masks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from harness import describe_run, pick_device, results_directory, show_log

from proxsparse.data.calibration import Calibration
from proxsparse.data.sources import read_text
from proxsparse.data.tokenizing import to_blocks, tokenize_text
from proxsparse.jobs.evaluate import evaluate_perplexity
from proxsparse.jobs.prune import run_method
from proxsparse.jobs.recipe import make_recipe
from proxsparse.models.loading import load_model
from proxsparse.models.masks import Masks, apply_masks_
from proxsparse.models.targets import find_targets

MODES = ("fast", "balanced", "low")  # fast first: the others are compared with it


def agreement(a: Masks, b: Masks) -> float:
    """The share of the weights that both keep or both prune."""
    same = sum(int((a[name] == b[name]).sum()) for name in a)
    return same / sum(a[name].numel() for name in a)


def summarize(rows: list[dict[str, Any]], masks: dict[tuple[str, int], Masks]) -> dict[str, Any]:
    """Per mode: perplexity (mean, spread over seeds), last loss, agreement of masks with `fast`."""
    summary: dict[str, Any] = {}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mine = [row for row in rows if row["mode"] == mode]
        perplexities = [row["heldout"] for row in mine]
        summary[mode] = {
            "heldout_mean": round(statistics.mean(perplexities), 3),
            "heldout_spread": round(max(perplexities) - min(perplexities), 3),
            "last_loss": round(statistics.mean(row["history"][-1]["loss"] for row in mine), 4),
        }
        if mode != "fast" and "fast" in summary:
            same = [agreement(masks[mode, row["seed"]], masks["fast", row["seed"]]) for row in mine]
            summary[mode]["masks_as_fast"] = round(statistics.mean(same), 4)
    fast = [masks[key] for key in masks if key[0] == "fast"]
    pairs = [agreement(a, b) for a, b in itertools.combinations(fast, 2)]
    if pairs:
        summary["fast"]["masks_as_other_seed"] = round(statistics.mean(pairs), 4)
    return summary


def main() -> None:
    """Run every mode from every seed; the file is written after each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a dense causal LM")
    parser.add_argument("--data", required=True, type=Path, help="directory of the two texts")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--heldout-blocks", type=int, default=None, help="default: all")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/<gpu>")
    args = parser.parse_args()
    show_log()

    base = load_model(args.model, pick_device())
    model, targets = base.model, find_targets(base.model)
    original = {t.name: t.weight().clone() for t in targets.layers}
    calibration, heldout = (
        to_blocks(tokenize_text(read_text(args.data / name), base.tokenizer), args.max_seq_length)
        for name in ("calibration.txt", "heldout.txt")
    )
    heldout = heldout[: args.heldout_blocks]
    out = args.out or results_directory()
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    masks: dict[tuple[str, int], Masks] = {}
    for seed, mode in itertools.product(range(args.seeds), args.modes):
        recipe = make_recipe(
            "gates",
            memory=mode,
            seed=seed,
            steps=args.steps,
            batch_size=args.batch_size,
            max_seq_length=args.max_seq_length,
        )
        draw = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(seed))
        blocks = calibration[draw[: recipe.num_samples]]
        data = Calibration(blocks, "calibration.txt", blocks.numel(), blocks.numel(), "")
        masks[mode, seed], history = run_method(model, targets, data, recipe)
        apply_masks_(model, masks[mode, seed])
        perplexity = evaluate_perplexity(model, heldout)
        for target in targets.layers:
            target.set_weight_(original[target.name])
        rows.append({"mode": mode, "seed": seed, "heldout": perplexity, "history": history})
        last = history[-1]
        print(
            f"seed {seed} {mode:8} held-out {perplexity:8.3f}  last loss {last['loss']:.4f}  "
            f"{last['tokens_per_second']:,.0f} tokens/s  {last['memory_gb']} GB",
            flush=True,
        )
        result = {
            **describe_run(),
            "settings": {
                **vars(args),
                "model": Path(args.model).name,
                "data": args.data.name,
                "out": None,
            },
            "summary": summarize(rows, masks) if mode == args.modes[-1] else {},
            "rows": rows,
        }
        (out / "learn_modes.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summarize(rows, masks)))


if __name__ == "__main__":
    main()
