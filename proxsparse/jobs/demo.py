"""The demo: every method on one small real model, on any machine, without a download.

The model ships with the package and was trained on the source text of Python's standard library;
the text to calibrate on is the standard library of the Python that runs the demo, and the text to
evaluate on is modules that neither the training nor the calibration has seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from proxsparse.data.calibration import Calibration, load_calibration
from proxsparse.data.corpus import stdlib_texts
from proxsparse.data.tokenizing import to_blocks, tokenize_text
from proxsparse.jobs.evaluate import evaluate_perplexity, remaining_loss
from proxsparse.jobs.output import mask_metadata, output_directory, pruned_report, write_result
from proxsparse.jobs.prune import run_method
from proxsparse.jobs.recipe import Recipe, make_recipe
from proxsparse.methods import METHODS
from proxsparse.models.loading import LoadedModel, load_model, resolve_device
from proxsparse.models.masks import Masks, apply_masks_, model_fingerprint
from proxsparse.models.precision import computing_in
from proxsparse.models.targets import Targets, find_targets

PROMPT = 'if __name__ == "__main__":\n    import'
# The simplest first, the default last; without MaskLLM, whose reference is slow.
_ORDER = tuple(name for name in reversed(METHODS) if name != "maskllm")


def run_demo(
    console: Console, output: str | os.PathLike[str] | None = None, *, quick: bool = False
) -> dict[str, Any]:
    """Compare all methods on the demo model and print a table.

    Args:
        console: where to print.
        output: directory for the model pruned by gates, its masks and the figure; None writes
            nothing.
        quick: fewer steps and less text, about a minute on two cores.

    Returns:
        {"results": {"dense": {"perplexity"}, method: {"perplexity", "remaining_loss", "seconds"}},
        "generated": {"dense": text, "gates": text}, "seconds": total, "output": path or None}.
    """
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        partial = None if output is None else stack.enter_context(output_directory(output))
        directory = stack.enter_context(as_file(files("proxsparse") / "demo_model"))
        base = load_model(directory, resolve_device("cpu"))
        result = _compare(console, base, partial, quick)
    result["seconds"] = round(time.perf_counter() - began, 1)
    result["output"] = None if output is None else str(output)
    if output is not None:
        console.print(f"the pruned model, its masks and comparison.png are in {output}")
    return result


def _recipe(method: str, quick: bool) -> Recipe:
    """The package's defaults on a budget that two cores can pay."""
    if method == "magnitude":
        return make_recipe(method)
    settings: dict[str, Any] = {"calibration": "stdlib", "max_seq_length": 256}
    if method in ("gates", "proxsparse"):
        settings.update(steps=30 if quick else 160, batch_size=4)
    if quick and method in ("wanda", "sparsegpt"):
        settings["num_calibration_samples"] = 64
    return make_recipe(method, **settings)


def _calibration(tokenizer: Any, model: Any, quick: bool) -> Calibration:
    """The blocks of every method: the first ones drawn serve those that need fewer."""
    recipe = _recipe("gates", quick)
    length = recipe.calibration.max_seq_length or 0
    modules = stdlib_texts("train")
    random.Random(recipe.calibration.seed).shuffle(modules)
    enough = 12 * recipe.num_samples * length  # characters, with slack
    lengths = itertools.accumulate(len(text) for _, text in modules)
    texts = [text for (_, text), length in zip(modules, lengths, strict=True) if length < enough]
    return load_calibration(texts, tokenizer, recipe.calibration, recipe.num_samples, model)


def _compare(
    console: Console, base: LoadedModel, partial: Path | None, quick: bool
) -> dict[str, Any]:
    model, tokenizer = base.model, base.tokenizer
    targets = find_targets(model)
    calibration = _calibration(tokenizer, model, quick)
    text = "\n".join(content for _, content in stdlib_texts("heldout"))
    blocks = to_blocks(tokenize_text(text, tokenizer), 512)[: 16 if quick else 64]
    console.print(
        f"A {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M-parameter Llama trained on "
        f"Python's standard library; evaluated on {blocks.numel():,} tokens of held-out modules.",
        highlight=False,
    )
    results: dict[str, dict[str, float]] = {}
    runs: dict[str, tuple[Masks, list[dict[str, float]]]] = {}
    generated: dict[str, str] = {}
    with computing_in(model, torch.float32):  # the same numbers as in bfloat16, and fast on a CPU
        original = {t.name: t.weight().clone() for t in targets.layers}
        dense = evaluate_perplexity(model, blocks)
        results["dense"] = {"perplexity": dense}
        generated["dense"] = _generate(base)
        for method in _ORDER:
            recipe = _recipe(method, quick)
            data = dataclasses.replace(calibration, tokens=calibration.tokens[: recipe.num_samples])
            began = time.perf_counter()
            runs[method] = run_method(model, targets, data, recipe)
            seconds = time.perf_counter() - began
            apply_masks_(model, runs[method][0])
            perplexity = evaluate_perplexity(model, blocks)
            results[method] = {"perplexity": perplexity, "seconds": round(seconds, 2)}
            if method == "gates":
                generated["gates"] = _generate(base)
            for target in targets.layers:
                target.set_weight_(original[target.name])
    wanda = results["wanda"]["perplexity"]
    for method in _ORDER:
        figures = results[method]
        figures["remaining_loss"] = remaining_loss(figures["perplexity"], dense, wanda)
    _print_results(console, results)
    for name, sample in generated.items():
        console.print(f"\n{name} continues the prompt:", style="bold", highlight=False)
        console.print(sample, highlight=False, markup=False)
    if partial is not None:
        recipe = _recipe("gates", quick).for_model(base.model)
        _write(partial, base, targets, runs, results, recipe, blocks.numel())
    return {"results": results, "generated": generated}


def _write(
    directory: Path,
    base: LoadedModel,
    targets: Targets,
    runs: dict[str, tuple[Masks, list[dict[str, float]]]],
    results: dict[str, dict[str, float]],
    recipe: Recipe,
    num_tokens: int,
) -> None:
    """The model pruned by gates, its masks, and the figure."""
    from proxsparse.jobs.plots import plot_comparison

    masks, history = runs["gates"]
    named = dataclasses.replace(base, id="proxsparse demo model")  # not where it lies here
    fingerprint = model_fingerprint(targets)
    masks.metadata.update(mask_metadata(recipe, fingerprint, named.id, None))
    report = pruned_report(
        recipe.as_dict(),
        named,
        fingerprint,
        targets,
        masks,
        weights_updated=False,
        results=results,
    )
    report["quality"] = {
        "perplexity": results["gates"]["perplexity"],
        "perplexity_dense": results["dense"]["perplexity"],
        "tokens": num_tokens,
        "source": "held-out modules of Python's library",
    }
    apply_masks_(base.model, masks)
    plot_comparison(
        {name: figures["perplexity"] for name, figures in results.items()},
        {name: run[1] for name, run in runs.items() if run[1]},
        directory / "comparison.png",
    )
    write_result(directory, base, masks, report, history, dense_loss=0.0)


def _generate(base: LoadedModel) -> str:
    """The greedy continuation of `PROMPT`."""
    tokens = tokenize_text(PROMPT, base.tokenizer)[None]
    out = base.model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=60, do_sample=False
    )
    return str(base.tokenizer.decode(out[0], skip_special_tokens=True))


def _print_results(console: Console, results: dict[str, dict[str, float]]) -> None:
    table = Table("method", "perplexity", "loss left *", "seconds")
    table.add_row("dense", f"{results['dense']['perplexity']:.2f}", "", "")
    for method in _ORDER:
        figures = results[method]
        table.add_row(
            METHODS[method].title,
            f"{figures['perplexity']:.2f}",
            f"{figures['remaining_loss']:.0%}",
            f"{figures['seconds']:.1f}",
        )
    console.print(table)
    console.print("* the share of Wanda's loss in log-perplexity that remains")
