"""A whole model, dense and then sparse: prefill, decode, memory, conversion, logits.

    python benchmarks/bench_model.py [--keep-dense] [--batches B ...] [--tokens M]
        [--no-compile] [--tune-seconds S] [--config FILE] [--out DIR]
    python benchmarks/bench_model.py --tiny        # the same on a toy, anywhere

The model has Llama-3.1-8B's shape and random weights, made on the device. It is timed dense, then
pruned to 2:4 in place, then made sparse. In between, masked, that is as a dense model with zeros,
it computes what the sparse one does: its logits are the reference, and its prefill is timed too,
because multiplying by zeros takes less power, and so a GPU at its power limit is faster at it.

All run on the same stack: transformers, its sdpa attention, and for decoding
`proxsparse.inference.decoding.Decoder`, on a GPU as a CUDA graph. torch.compile fuses small kernels
in all of them (in the sparse model also products of one input): of a decode step as a whole, of a
prompt in each decoder block, because what is decided before the blocks, as that no mask is needed,
is decided differently while all of it is traced. Prefill takes a GPU to its power limit, which
lowers its clocks: they are given time to settle before it is timed. A decode step cannot be faster
than its weights and its cache can be loaded, dense or packed; these limits are printed beside what
was measured. Logits are compared without torch.compile; the yardstick is how far the masked
model's move when a second sequence joins the batch.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import inspect
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_learn_8b import LLAMA_8B, TINY
from harness import copy_bandwidth, describe_run, pick_device, results_directory, time_interleaved
from torch import Tensor, nn

from proxsparse import ops, sparsify_
from proxsparse.inference.decoding import Decoder
from proxsparse.inference.sparse_linear import sparse_layers
from proxsparse.models.loading import build_model, state_bytes
from proxsparse.models.targets import find_targets
from proxsparse.tuning.tune import tune_layers

PROMPT = 128  # tokens read before decoding is timed
LOGITS_KEPT = 64  # positions compared, at most
SETTLE_SECONDS = 2.0  # of prefill, until a GPU's clocks settle
WRONG_FROM = 0.1  # rounding moves logits by some hundredths, a wrong product by about 1


def make_model(config: Path | dict[str, Any], device: torch.device) -> Any:
    """With random weights."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(config, dict):
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(config))
            config = path
        torch.manual_seed(0)
        model = build_model(config, device)
    model.set_attn_implementation("sdpa")
    return model


def prune(model: Any) -> None:
    """Makes the targets 2:4 in place."""
    for target in find_targets(model).layers:
        target.set_weight_(ops.project_2to4(target.weight()))


def tune(model: Any, tokens: list[int], seconds: float) -> str:
    """Lets the layers find what to run on; returns what came of it, or why nothing did."""
    if not seconds:
        return "no: --tune-seconds is 0"
    layers, reasons = [], []
    for target in find_targets(model).layers:
        n, k = target.shape[-2:]
        reasons.append(ops.can_compress(n, k, model.dtype))
        if not reasons[-1]:
            layers.append((n, k, getattr(target.module, "bias", None) is not None))
    if not layers:
        return f"no: {reasons[0]}"
    layers = list(dict.fromkeys(layers))
    index = torch.cuda.current_device()
    report = tune_layers(layers, tokens, dtype=model.dtype, device=index, seconds=seconds)
    return str(report)


def random_tokens(model: Any, *shape: int) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, device=model.device)


@torch.no_grad()
def last_logits(model: Any, input_ids: Tensor, kept: int = 1) -> Tensor:
    """Of the last positions, [B, kept, vocabulary]; no cache is made."""
    accepted = "logits_to_keep" in inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": kept} if accepted else {}
    # Without one, transformers 4 makes a mask of its own, and so keeps flash attention away.
    options["attention_mask"] = torch.ones_like(input_ids)
    logits: Tensor = model(input_ids, use_cache=False, **options).logits[:, -kept:]
    return logits


@contextlib.contextmanager
def compiled(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Decoder blocks run compiled; those that look alike to torch.compile share their code.

    In place, so that the model around them stays what it is, signature and all.
    """
    for block in blocks:
        block.compile()
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def weight_bytes(model: Any) -> int:
    """Of everything that is held, sparse layers in all their forms."""
    forms = [layer.memory_bytes() for layer in sparse_layers(model).values()]
    return state_bytes(model) + sum(f["compressed"] + f["dense"] for f in forms)


def bytes_read(model: Any) -> int:
    """Of weights, in a decode step: all but an embedding that is only looked up; sparse packed."""
    embedding = model.get_input_embeddings().weight
    is_tied = model.get_output_embeddings().weight is embedding
    return state_bytes(model) - (0 if is_tied else embedding.numel() * embedding.element_size())


def relative(difference: Tensor, reference: Tensor) -> float:
    """In the Frobenius norm."""
    return (difference.norm() / reference.norm()).item()


def time_prefill(
    model: Any, blocks: Sequence[nn.Module], kind: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Times the prefill of one prompt with the model as it is."""
    x = random_tokens(model, 1, args.tokens)

    def read() -> None:
        last_logits(model, x)

    with compiled(blocks if args.compile else ()):
        settle(read, model.device)
        (seconds,) = time_interleaved([read], lambda: None, model.device, 4 * args.rounds)
    mode = "compiled" if args.compile else "eager"
    return row_of("prefill", 1, kind, mode, args.tokens, seconds, None)


def time_decoding(
    model: Any, kind: str, args: argparse.Namespace, bandwidth: float
) -> list[dict[str, Any]]:
    """Times decoding with the model as it is; a row for each batch size."""
    rows, weights, steps = [], bytes_read(model), args.steps
    for batch in args.batches:
        decoder = Decoder(model, batch, PROMPT + steps + 1, compile=args.compile)
        prompt = random_tokens(model, batch, PROMPT)

        def decode(decoder: Decoder = decoder) -> None:
            for _ in range(steps):
                decoder.step()

        def reset(decoder: Decoder = decoder, prompt: Tensor = prompt) -> None:
            decoder.prefill(prompt)

        limit = (weights + decoder.cache_bytes) / bandwidth
        print(f"decode, batch {batch}, {kind}: {weights / 1e9:.2f} GB of weights and "
              f"{decoder.cache_bytes / 1e9:.3f} GB of cache a step, "
              f"at best {batch / limit:.0f} tokens/s")  # fmt: skip
        (seconds,) = time_interleaved([decode], reset, model.device, args.rounds)
        tokens = batch * steps
        rows.append(row_of("decode", batch, kind, decoder.mode, tokens, seconds, steps * limit))
    return rows


def settle(run: Callable[[], None], device: torch.device) -> None:
    """Runs until the clocks of a GPU can be taken for settled."""
    run()
    began = time.perf_counter()
    while device.type == "cuda" and time.perf_counter() - began < SETTLE_SECONDS:
        run()
        torch.cuda.synchronize()


def row_of(
    case: str,
    batch: int,
    weights: str,
    mode: str,
    tokens: int,
    seconds: list[float],
    limit: float | None,
) -> dict[str, Any]:
    """A row of the table; `limit` in seconds."""
    median = statistics.median(seconds)
    row = {
        "case": case,
        "batch": batch,
        "weights": weights,
        "mode": mode,
        "tokens": tokens,
        "ms_p50": round(median * 1e3, 3),
        "ms_min": round(min(seconds) * 1e3, 3),
        "ms_max": round(max(seconds) * 1e3, 3),
        "tokens_per_s": round(tokens / median, 1),
        "limit_tokens_per_s": limit and round(tokens / limit, 1),
        "pct_of_limit": limit and round(100 * limit / median, 1),
    }
    print(" | ".join("-" if x is None else str(x) for x in row.values()), flush=True)
    return row


def convert(model: Any, keep_dense: bool) -> dict[str, float | None]:
    """Makes the model sparse; seconds, and the memory it took beside the dense model.

    Seconds include the first use of every kernel involved.
    """
    is_cuda = model.device.type == "cuda"
    before = 0
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    report = sparsify_(model, keep_dense=keep_dense)
    if is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() - before if is_cuda else None
    print(f"{len(report.sparse)} layers made sparse in {seconds:.2f} s", end="")
    print("" if peak is None else f", with {peak / 1e9:.2f} GB beside the dense model")
    return {"seconds": round(seconds, 3), "peak_gb": peak and round(peak / 1e9, 3)}


def compare(masked: Tensor, joined: Tensor, sparse: Tensor, tokens: int) -> dict[str, float]:
    """How far the sparse model's logits are from the masked model's, and the yardstick."""
    masked, difference = masked.float(), sparse.float() - masked.float()
    row = {
        "tokens": tokens,
        "max_abs": difference.abs().max().item(),
        "mean_abs": difference.abs().mean().item(),
        "rel_diff": relative(difference, masked),
        "rel_yardstick": relative(joined.float() - masked, masked),
    }
    print(f"logits of {tokens} tokens: sparse differs from masked by {row['rel_diff']:.2e} of "
          f"them (at most {row['max_abs']:.3g}, on average {row['mean_abs']:.3g}); "
          f"masked in a batch of two: {row['rel_yardstick']:.2e}")  # fmt: skip
    assert row["rel_diff"] < WRONG_FROM, "the sparse model computes something else"
    return row


def speedups(
    rows: list[dict[str, Any]], key: str = "tokens_per_s", over: str = "dense"
) -> dict[str, float]:
    """Case -> sparse over dense in tokens/s, measured or at the limit; "decode_b8" and so on."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        case = row["case"] if row["case"] == "prefill" else f"decode_b{row['batch']}"
        found.setdefault(case, {})[row["weights"]] = row[key]
    return {case: both["sparse"] / both[over] for case, both in found.items() if both.get(over)}


def draw(measured: dict[str, float], limits: dict[str, float], path: Path) -> None:
    """A bar for each speed-up, a mark where its limit is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.8 + 0.4 * len(measured)), layout="constrained", dpi=150)
    axis = figure.subplots()
    names = [case.replace("_b", ", batch ") for case in measured]
    bars = axis.barh(names, list(measured.values()), color="#0b7a75")
    axis.bar_label(bars, fmt="%.2f", label_type="center", color="white", fontsize=8)
    for index, case in enumerate(measured):
        if case in limits:
            axis.plot([limits[case]] * 2, [index - 0.4, index + 0.4], color="black")
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="speed-up of the whole model over dense; | at the limit of bytes")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep-dense", action="store_true", help="hold the dense weights too")
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt that is read")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="for decoding")
    parser.add_argument("--steps", type=int, default=64, help="decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether torch.compile fuses small kernels",
    )
    parser.add_argument("--tune-seconds", type=float, default=300, help="0: no tuning")
    parser.add_argument("--config", type=Path, help="config.json of another causal LM")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the script")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>")
    args = parser.parse_args()
    if args.tiny:
        args.tokens, args.steps, args.rounds = min(args.tokens, 256), 8, 2
    return args


def main() -> None:
    """Build, tune, measure dense, prune, convert, compare, measure sparse, write."""
    args = parse_arguments()
    if args.compile:  # else torch.compile would give up with a warning, and eager code be timed
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    device = pick_device()
    model = make_model(args.config or (TINY if args.tiny else LLAMA_8B), device)
    blocks = find_targets(model).blocks  # found by their linear layers, while there are some
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {model.dtype}".replace("torch.", ""))
    counts = sorted({*args.batches, args.tokens})
    tuned = tune(model, counts, args.tune_seconds)
    print(f"tuned: {tuned}")
    bandwidth = copy_bandwidth(2**30 if device.type == "cuda" else 2**26, device)
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    print("case | batch | weights | mode | tokens | ms p50 | min | max | tokens/s | limit | %")

    dense_bytes, dense_read = weight_bytes(model), bytes_read(model)
    rows = [time_prefill(model, blocks, "dense", args)]
    rows += time_decoding(model, "dense", args, bandwidth)
    prune(model)
    rows.append(time_prefill(model, blocks, "masked", args))
    before = []
    for count in counts:
        kept, x = min(count, LOGITS_KEPT), random_tokens(model, 2, count)
        alone, joined = last_logits(model, x[:1], kept)[0], last_logits(model, x, kept)[0]
        before.append((x[:1], alone, joined))
    conversion = convert(model, args.keep_dense)
    logits = [
        compare(alone, joined, last_logits(model, x, len(alone))[0], x.shape[1])
        for x, alone, joined in before
    ]
    rows.append(time_prefill(model, blocks, "sparse", args))
    rows += time_decoding(model, "sparse", args, bandwidth)

    measured = speedups(rows)
    limits = speedups([r for r in rows if r["case"] == "decode"], "limit_tokens_per_s")
    for case, speedup in measured.items():
        print(f"{case}: {speedup:.2f} x dense{' SLOWER' if speedup < 1 else ''}", end="")
        print(f", at best {limits[case]:.2f}" if case in limits else "")
    sparse_bytes = weight_bytes(model)
    print(f"weights: {dense_bytes / 1e9:.2f} -> {sparse_bytes / 1e9:.2f} GB")
    summary = {
        "prefill_speedup": measured["prefill"],
        "prefill_speedup_vs_masked": speedups(rows, over="masked")["prefill"],
        **{f"decode_speedup_b{b}": measured[f"decode_b{b}"] for b in args.batches},
        **{f"decode_limit_b{b}": limits[f"decode_b{b}"] for b in args.batches},
        "weight_memory_ratio": sparse_bytes / dense_bytes,
        "compress_seconds": conversion["seconds"],
        "logits_rel_diff": max(row["rel_diff"] for row in logits),
        "logits_rel_yardstick": max(row["rel_yardstick"] for row in logits),
    }
    result = {
        **describe_run(),
        "settings": {
            **vars(args),
            "config": args.config and str(args.config),
            "out": None,
            "parameters": parameters,
            "dtype": str(model.dtype).removeprefix("torch."),
            "prompt": PROMPT,
        },
        "tuned": tuned,
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "summary": {key: float(f"{value:.4g}") for key, value in summary.items()},
        "weight_bytes": {"dense": dense_bytes, "sparse": sparse_bytes},
        "weight_bytes_read": {"dense": dense_read, "sparse": bytes_read(model)},
        "conversion": conversion,
        "logits": logits,
        "rows": rows,
    }
    out, name = args.out or results_directory(), "model_tiny" if args.tiny else "model"
    name += "" if args.compile else "_eager"
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(measured, limits, out / f"{name}.png")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
