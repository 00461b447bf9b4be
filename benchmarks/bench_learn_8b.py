"""An 8-billion-parameter model on one GPU: seconds a step, peak memory, FLOP utilisation.

    python benchmarks/bench_learn_8b.py [--modes balanced low] [--methods wanda ...] [--out DIR]
    python benchmarks/bench_learn_8b.py --tiny        # the same on a toy, anywhere

The model has Llama-3.1-8B's shape and random weights, made on the device; the text is random
tokens. A step is one sequence of 4096 tokens. The first ten steps warm up; those after it are
timed by the loop's own records, checkpoints apart, so what is timed is what a user's run does.
Utilisation counts the 6*N*T operations of the model's forward and backward (N without the
embedding, no attention scores), not the forward that is run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import describe_run, pick_device, results_directory, show_log

from proxsparse.jobs.prune import load_data, run_method, settle_memory
from proxsparse.jobs.recipe import Recipe, make_recipe
from proxsparse.learning.memory import memory_gb
from proxsparse.models.loading import build_model
from proxsparse.models.targets import find_targets

LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
TINY = LLAMA_8B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WARM_UP = 10


def measure(model: Any, recipe: Recipe) -> dict[str, Any]:
    """Run a recipe on the model; wall time and peak memory, and the records of a learned method."""
    device = next(model.parameters()).device
    targets = find_targets(model)
    recipe = settle_memory(recipe, model, targets, device)
    data = load_data(None, None, recipe, model)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    _, history = run_method(model, targets, data, recipe)
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 2), "peak_gb": memory_gb(device), "history": history}


def seconds_per_step(history: list[dict[str, float]], tokens: int) -> float:
    """Of the steps after the warm-up, from the throughput since the start that records hold."""

    def elapsed(record: dict[str, float]) -> float:
        return record["step"] * tokens / record["tokens_per_second"]

    first = next(record for record in history if record["step"] == WARM_UP)
    last = history[-1]
    return (elapsed(last) - elapsed(first)) / (last["step"] - first["step"])


def main() -> None:
    """Measure every mode and method asked for; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="*", default=["balanced", "low"])
    parser.add_argument("--methods", nargs="*", default=[], help="wanda, sparsegpt, magnitude")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--tokens", type=int, default=4096, help="in a step")
    parser.add_argument("--samples", type=int, default=128, help="blocks for --methods")
    parser.add_argument("--sample-length", type=int, default=2048, help="tokens in each of them")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="dense bfloat16, H100/H200"
    )
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the script")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/<gpu>")
    args = parser.parse_args()
    show_log()
    if args.tiny:
        args.tokens = args.sample_length = 64
        args.samples = 4

    device = pick_device()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(TINY if args.tiny else LLAMA_8B))
        torch.manual_seed(0)
        model = build_model(path, device)
    embedding = model.get_input_embeddings().weight.numel()
    used = sum(p.numel() for p in model.parameters()) - embedding
    flops = 8 * used * args.tokens  # forward, backward, and the dense model's forward
    print(f"{used + embedding:,} parameters; {flops:.3g} FLOP a step; at best {args.peak_tflops} "
          f"TFLOP/s, so at least {flops / args.peak_tflops / 1e12:.3f} s")  # fmt: skip

    summary: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    named = vars(args) | {"out": None}
    result = {**describe_run(), "settings": named, "summary": summary, "rows": rows}
    out = args.out or results_directory()
    out.mkdir(parents=True, exist_ok=True)

    def report(row: dict[str, Any], **figures: float) -> None:
        rows.append(row)
        summary.update({key: round(value, 4) for key, value in figures.items()})
        print({k: v for k, v in row.items() if k != "history"}, figures, flush=True)
        name = "learn_8b_tiny.json" if args.tiny else "learn_8b.json"
        (out / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    for mode in args.modes:
        recipe = make_recipe(
            "gates",
            memory=mode,
            steps=WARM_UP + args.steps,
            batch_size=1,
            max_seq_length=args.tokens,
            checkpoint_every=0,
            random_init=True,
        )
        row = {"name": mode, **measure(model, recipe)}
        step = seconds_per_step(row["history"], args.tokens)
        figures = {f"{mode}_s_per_step": step, f"{mode}_peak_gb": row["peak_gb"]}
        if mode == args.modes[0]:
            figures["mfu"] = flops / step / (args.peak_tflops * 1e12)
            figures["minutes_400_steps"] = 400 * step / 60
        report(row, **figures)
    for method in args.methods:
        settings = {} if method == "magnitude" else {
            "num_calibration_samples": args.samples, "max_seq_length": args.sample_length,
        }  # fmt: skip
        recipe = make_recipe(method, random_init=True, **settings)
        row = {"name": method, **measure(model, recipe)}
        figures = {f"{method}_seconds": row["seconds"], f"{method}_peak_gb": row["peak_gb"]}
        report(row, **figures)
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}))


if __name__ == "__main__":
    main()
