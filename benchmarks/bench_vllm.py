"""vLLM with a dense and with a sparse model: decode, prefill, throughput, room for the KV cache.

    python benchmarks/bench_vllm.py [--config FILE] [--cases NAME ...] [--iterations N] [--out DIR]
    python benchmarks/bench_vllm.py --quick        # a toy, anywhere vLLM runs

The model has Llama-3.1-8B's shape, and weights that vLLM makes up (`--load-format dummy`): two
directories with nothing but a config.json, of which one names its packed layers. Each is served by
an engine of its own, with CUDA graphs and torch.compile, in a child process, with the same
settings. What is timed is what `vllm bench latency` and `vllm bench throughput` time, by the same
calls; it is timed in one engine after the other case, because an engine takes longer to start than
to measure:

- decode: a batch of prompts of 128 tokens, 128 tokens generated of each;
- prefill: 4 prompts of 2048 tokens, one token generated of each;
- throughput: 256 requests of 512 tokens, 128 tokens generated of each, all handed over at once.

Before anything is timed, a layer of each shape inside the sparse engine is compared with its own
weight made dense. Beside the speed-up of decoding stands what the bytes allow: a step reads every
linear weight, the output embedding and the KV cache once.

A GPU machine without network needs these parts of vLLM 0.26.0 (torch 2.11): of its wheel the Python
files, `_C_stable_libtorch.abi3.so` and `vllm_flash_attn/_vllm_fa3_C.abi3.so`, its dist-info (vLLM
asks for its own version), and those of its requirements that the Llama path imports; not
`_moe_C`, FlashAttention 2, flashinfer, tilelang, cutlass or the others with GPU code. Both must be
on PYTHONPATH, with proxsparse and its dist-info, in which the entry point stands. Set
VLLM_USE_FLASHINFER_SAMPLER=0 and HF_HUB_OFFLINE=1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench_learn_8b import LLAMA_8B, TINY
from harness import describe_run, results_directory

KINDS = ("dense", "sparse")
PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
WRONG_FROM = 0.02  # of the largest value; rounding in bfloat16 stays below
FRACTION = 9 / 16  # of a weight's bytes, packed


class Case(NamedTuple):
    """What is generated at once."""

    requests: int
    read: int  # tokens of each prompt
    written: int


CASES = {
    **{f"decode_b{batch}": Case(batch, 128, 128) for batch in (1, 8, 32, 128)},
    "prefill": Case(4, 2048, 1),
    "throughput": Case(256, 512, 128),
}
TOY = TINY | {"hidden_size": 128, "intermediate_size": 256}  # heads as wide as vLLM takes
QUICK = {"decode_b1": Case(1, 8, 4), "prefill": Case(2, 32, 1), "throughput": Case(4, 16, 4)}


def write_configs(config: dict[str, Any], folder: Path) -> dict[str, Path]:
    """A directory of each kind with its config.json."""
    layers = [
        f"model.layers.{i}.{name}"
        for i in range(config["num_hidden_layers"])
        for name in PROJECTIONS
    ]
    entry = {"quant_method": "proxsparse", "format_version": 2, "layers": layers}
    paths = {}
    for kind in KINDS:
        paths[kind] = folder / kind
        paths[kind].mkdir()
        more = {"quantization_config": entry} if kind == "sparse" else {}
        (paths[kind] / "config.json").write_text(json.dumps({**config, **more}))
    return paths


def step_bytes(config: dict[str, Any], kind: str, case: Case) -> float:
    """Bytes that a decode step must read, at the middle of the generation."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or hidden // heads
    attention = hidden * head * (2 * heads + 2 * kv_heads)
    linear = config["num_hidden_layers"] * (attention + 3 * hidden * inner)
    cached = case.read + case.written / 2
    cache = case.requests * cached * config["num_hidden_layers"] * 2 * kv_heads * head
    packed = FRACTION if kind == "sparse" else 1
    return 2 * (linear * packed + hidden * config["vocab_size"] + cache)


def check_layers(model: Any) -> float:
    """Largest error of a layer of each shape against its own weight made dense; in the worker."""
    import torch

    largest, seen = 0.0, set()
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        layout = getattr(method, "layout", None)
        if layout is None or (layout.sizes, layout.k) in seen:
            continue
        seen.add((layout.sizes, layout.k))
        w = layout.weight(layer.weight)
        for tokens in (1, 16, 64, 100, 512, 2048):
            x = torch.randn(tokens, layout.k, device=w.device).to(w.dtype)
            expected = torch.nn.functional.linear(x, w).float()
            error = (method.apply(layer, x).float() - expected).abs().max()
            largest = max(largest, (error / expected.abs().max()).item())
    assert seen, "no layer of the model is sparse"
    return largest


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """In a child: starts an engine and times each case."""
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `check_layers`
    import torch
    from vllm import LLM, SamplingParams

    cases = QUICK if options.quick else CASES
    longest = max(case.read + case.written for case in cases.values())
    llm = LLM(
        options.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enable_prefix_caching=False,
        max_model_len=longest + 16,
        max_num_batched_tokens=max(8192 if not options.quick else 64, longest),
        max_num_seqs=256 if not options.quick else 8,
        enforce_eager=options.quick,
        **({"distributed_executor_backend": "uni"} if options.quick else {}),
    )
    found: dict[str, Any] = {"num_blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks}
    if options.measure == "sparse":
        (error,) = llm.apply_model(check_layers)
        if error > WRONG_FROM:
            raise SystemExit(f"a sparse layer is wrong: its error is {error:.3f} of the largest")
        found["error"] = error
    generator = torch.Generator().manual_seed(0)
    for name in options.cases or cases:
        case = cases[name]
        how = SamplingParams(
            temperature=1.0, ignore_eos=True, max_tokens=case.written, detokenize=False
        )
        seconds = []
        rounds = 2 if name == "throughput" else options.iterations + 2
        for _ in range(rounds):
            shape = (case.requests, case.read)
            ids = torch.randint(10, options.vocabulary, shape, generator=generator)
            prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
            start = time.perf_counter()
            llm.generate(prompts, how, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
        found[name] = seconds[1:] if name == "throughput" else seconds[2:]
        print(f"{options.measure} {name}: {statistics.median(found[name]):.4f} s", flush=True)
    return found


def run_child(kind: str, path: Path, options: argparse.Namespace, vocabulary: int) -> Any:
    """Times one kind in a process of its own."""
    output = path / "measured.json"
    command = [sys.executable, __file__, "--measure", kind, "--model", str(path)]
    command += ["--json", str(output), "--vocabulary", str(vocabulary)]
    command += ["--iterations", str(options.iterations)]
    command += ["--quick"] if options.quick else []
    command += ["--cases", *options.cases] if options.cases else []
    environment = dict(os.environ)
    if options.quick:
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    subprocess.run(command, check=True, env=environment)
    return json.loads(output.read_text())


def draw(summary: dict[str, float], limits: dict[str, float], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    names = [name for name in CASES if name in summary]
    figure = Figure(figsize=(7, 3), layout="constrained", dpi=150)
    axis = figure.subplots()
    bars = axis.bar(names, [summary[name] for name in names], color="#0b7a75", label="measured")
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    bounded = [name for name in names if name in limits]
    axis.plot(bounded, [limits[name] for name in bounded], "k_", ms=24, label="the bytes allow")
    axis.axhline(1, color="#888888", lw=1)
    axis.set(ylabel="times dense vLLM")
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="config.json of a model like Llama")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all")
    parser.add_argument("--iterations", type=int, default=5, help="of each case, timed")
    parser.add_argument("--quick", action="store_true", help="a toy model, eager, few tokens")
    parser.add_argument("--out", type=Path)
    for hidden in ("--measure", "--model", "--json"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        Path(options.json).write_text(json.dumps(measure(options)))
        return

    import vllm

    config = json.loads(options.config.read_text()) if options.config else None
    config = config or (TOY if options.quick else LLAMA_8B)
    cases = QUICK if options.quick else CASES
    with tempfile.TemporaryDirectory() as folder:
        paths = write_configs(config, Path(folder))
        found = {k: run_child(k, paths[k], options, config["vocab_size"]) for k in KINDS}
    dense, sparse = (found[kind] for kind in KINDS)
    timed = [name for name in cases if name in dense]
    summary = {
        name: round(statistics.median(dense[name]) / statistics.median(sparse[name]), 3)
        for name in timed
    }
    limits = {
        name: round(
            step_bytes(config, "dense", cases[name]) / step_bytes(config, "sparse", cases[name]), 3
        )
        for name in timed
        if name.startswith("decode")
    }
    result = {
        **describe_run(),
        "vllm": vllm.__version__,
        "settings": {"config": config, "iterations": options.iterations, "quick": options.quick},
        "cases": {name: cases[name]._asdict() for name in timed},
        "limits": limits,
        "kv_cache_blocks": {kind: found[kind]["num_blocks"] for kind in KINDS},
        "error": sparse["error"],
        "seconds": {kind: {name: found[kind][name] for name in timed} for kind in KINDS},
        "summary": summary,
    }
    for name in timed:
        bound = f", the bytes allow {limits[name]:.2f}" if name in limits else ""
        print(f"{name:12} {summary[name]:.2f} times dense{bound}")
    print("KV-cache blocks:", ", ".join(f"{k} {n}" for k, n in result["kv_cache_blocks"].items()))
    if options.out or not options.quick:
        out = options.out or results_directory()
        out.mkdir(parents=True, exist_ok=True)
        (out / "vllm.json").write_text(json.dumps(result, indent=1) + "\n")
        title = f"vLLM {vllm.__version__}, 2:4 against dense, {result['device']}"
        draw(summary, limits, title, out / "vllm.png")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
