"""The command line. Flags come from the config dataclasses; each command imports lazily."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

from proxsparse.cli import show
from proxsparse.cli.framework import (
    Device,
    KeepDense,
    Output,
    app,
    choose_wait_policy,
    command,
    quiet_transformers,
    settings,
)
from proxsparse.config import (
    FP8_DYNAMIC,
    METHOD_OPTIONS,
    CalibrationConfig,
    EvalConfig,
    LearnConfig,
    RunConfig,
    TargetConfig,
    check_scheme,
    replace,
    split_list,
)
from proxsparse.errors import ProxsparseError
from proxsparse.jobs.checks import (
    check_file,
    check_model,
    check_output,
    check_prune,
    check_recover,
    check_text,
)

__all__ = ["app", "main"]


@command
@settings(
    ("Calibration", CalibrationConfig),
    ("Layers", TargetConfig),
    ("Learning", LearnConfig),
    ("Machine", RunConfig),
    *((f"Only for method {name}", config) for name, config in METHOD_OPTIONS.items()),
)
def prune(
    model: Annotated[str, typer.Argument(help="Model directory, or name on the Hub.")],
    *,
    output: Output,
    method: Annotated[str | None, typer.Option(help=f"One of {', '.join(METHOD_OPTIONS)}.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Published settings of the paper for a model, e.g. llama-2-7b."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of the same job.")
    ] = False,
    no_quality: Annotated[
        bool, typer.Option("--no-quality", help="Do not measure perplexity before and after.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would be done, and how long it takes; do nothing."
        ),
    ] = False,
    verbose: bool = False,
    console: Console,
    **settings: Any,
) -> dict[str, Any]:
    """Prune a model to 2:4 and write it to a directory.

    With no flag but --calibration it learns gates on 1.6 million tokens; more are better.

    Example: proxsparse prune ./llama --calibration text.txt --tokens 25M --output ./llama-2to4
    """
    check_prune(model, output, method=method, preset=preset, resume=resume, **settings)
    quiet_transformers()
    if dry_run:
        from proxsparse.jobs.plan import plan_prune

        plan = plan_prune(model, output, method=method, preset=preset, **settings)
        show.plan(console, plan, verbose)
        return plan
    from proxsparse.jobs.prune import prune as run

    result = run(
        model,
        output,
        method=method,
        preset=preset,
        resume=resume,
        quality=not no_quality,
        **settings,
    )
    report = result.report
    if not report:  # not the main process
        return {}
    table = show.columns("layer", "shape", "kept as by magnitude")
    rows = [
        (layer["name"], show.shape(layer["shape"]), f"{layer['overlap_with_magnitude']:.1%}")
        for layer in report["layers"]
    ]
    show.layers(console, table, rows, verbose)
    show.left_dense(console, report["left_dense"], verbose)
    if report["data"]:
        show.line(
            console,
            f"calibration: {report['data']['samples']:,} blocks, {report['data']['tokens']:,} "
            f"tokens from {report['data']['source']}",
        )
        if report["data"].get("prefix"):
            prefix = " ".join(report["data"]["prefix"])
            show.line(console, f"before each block: {prefix}, which the tokenizer adds")
    show.quality(console, report)
    show.line(
        console,
        f"{report['recipe']['method']}: {len(report['layers'])} layers pruned to 2:4 in "
        f"{report['seconds']:.1f} s, written to {output}",
    )
    return {"output": output, **report}


@command
@settings(
    ("Calibration", CalibrationConfig),
    ("Learning", LearnConfig),
    ("Machine", RunConfig),
    without=("lam", "random_init"),
)
def recover(
    model: Annotated[str, typer.Argument(help="A pruned model, directory or Hub name.")],
    *,
    base: Annotated[str, typer.Option(help="The dense model it came from.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Directory to create [default: MODEL-recovered]."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of the same job.")
    ] = False,
    console: Console,
    **settings: Any,
) -> dict[str, Any]:
    """Train the kept weights of a pruned model on, towards the dense one; the masks stay.

    --lr is in units of the kept weights of a layer, and need not be given.

    Example: proxsparse recover ./llama-2to4 --base ./llama --calibration text.txt --tokens 25M
    """
    output = check_recover(model, base, output, resume=resume, **settings)
    from proxsparse.jobs.recover import recover as run

    quiet_transformers()
    report = run(model, base, output, resume=resume, **settings).report
    if not report:  # not the main process
        return {}
    console.print(
        f"calibration: {report['data']['samples']:,} blocks, {report['data']['tokens']:,} tokens "
        f"from {report['data']['source']}",
        highlight=False,
    )
    console.print(
        f"the kept weights of {len(report['layers'])} layers are no longer those of {base}; "
        f"recovered in {report['seconds']:.1f} s, written to {output}",
        highlight=False,
    )
    return {"output": output, **report}


@command
def apply(
    model: Annotated[str, typer.Argument(help="The base model, directory or Hub name.")],
    *,
    mask: Annotated[str, typer.Option(help="A proxsparse.masks file, or a directory with one.")],
    output: Output,
    force: Annotated[
        bool, typer.Option("--force", help="Accept a base model with other weights.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    console: Console,
) -> dict[str, Any]:
    """Put a mask file on its base model, bit-identically to what prune wrote."""
    check_file(mask, "mask file", or_directory=True)
    check_model(model)
    check_output(output)
    from proxsparse.jobs.prune import apply as run

    quiet_transformers()
    report = run(model, mask, output, force=force, device=device).report
    if report["mask_from_updated_weights"]:
        console.print(
            "note: these masks come from a method that also updated the kept weights; here the "
            "kept weights are the base model's"
        )
    console.print(f"{len(report['layers'])} layers pruned to 2:4, written to {output}")
    return {"output": output, **report}


@command
def pack(
    model: Annotated[str, typer.Argument(help="A pruned model, directory or Hub name.")],
    *,
    output: Output,
    keep_dense: KeepDense = False,
    quantize: Annotated[
        str | None, typer.Option(help="Round the packed layers to 8 bits: FP8_DYNAMIC.")
    ] = None,
    verbose: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Store the 2:4 layers of a pruned model packed: 9/16 of their bytes in 16 bits.

    After `import proxsparse`, AutoModelForCausalLM.from_pretrained loads the result as a sparse
    model. Nothing is lost: unpack gives back the same bits. Layers that are not 2:4 stay dense and
    are named. With --quantize FP8_DYNAMIC they are rounded to FP8: 5/16 of their bytes.

    Example: proxsparse pack ./llama-2to4 --output ./llama-packed
    """
    check_model(model)
    check_output(output)
    check_scheme(quantize)
    from proxsparse.jobs.pack import pack as run

    quiet_transformers()
    result = run(model, output, keep_dense=keep_dense, quantize=quantize)
    show.left_dense(console, result["left_dense"], verbose)
    dense, packed = result["dense_bytes"], result["packed_bytes"]
    before, after = map(show.size, result["checkpoint_bytes"])
    console.print(
        f"{len(result['layers'])} layers packed: {show.size(dense)} -> {show.size(packed)} "
        f"({packed / dense:.4f}); with all else {before} -> {after}, written to {output}",
        highlight=False,
    )
    return {"output": output, **result}


@command
def unpack(
    model: Annotated[str, typer.Argument(help="A packed model, directory or Hub name.")],
    *,
    output: Output,
    console: Console,
) -> dict[str, Any]:
    """Turn a packed model back into the dense checkpoint with zeros, bit by bit.

    Every program that loads Hugging Face models loads the result.
    """
    check_model(model)
    check_output(output)
    from proxsparse.jobs.pack import unpack as run

    quiet_transformers()
    result = run(model, output)
    before, after = map(show.size, result["checkpoint_bytes"])
    console.print(
        f"{len(result['layers'])} layers unpacked: {before} -> {after}, written to {output}",
        highlight=False,
    )
    return {"output": output, **result}


@command
@settings(("Layers", TargetConfig))
def export(
    model: Annotated[str, typer.Argument(help="A model, dense or packed, directory or Hub name.")],
    *,
    output: Output,
    format: Annotated[str, typer.Option(help="FP8_DYNAMIC.")] = FP8_DYNAMIC,
    console: Console,
    **values: Any,
) -> dict[str, Any]:
    """Write a pruned model as an ordinary dense FP8 checkpoint of compressed-tensors.

    vLLM, SGLang and transformers load it as plain FP8; pruned weights are zeros, and cost as much
    as others there.

    Example: proxsparse export ./llama-2to4 --format FP8_DYNAMIC --output ./llama-fp8
    """
    check_model(model)
    check_output(output)
    check_scheme(format, what="--format")
    from proxsparse.jobs.export import export as run

    quiet_transformers()
    given = {name: tuple(value) for name, value in values.items() if value}
    result = run(model, output, format=format, **given)
    before, after = map(show.size, result["checkpoint_bytes"])
    console.print(
        f"{len(result['layers'])} layers in {format}, {result['num_2to4']} of them 2:4; "
        f"{before} -> {after}, written to {output}",
        highlight=False,
    )
    return {"output": output, **result}


@command
@settings(("Layers", TargetConfig))
def advise(
    model: Annotated[str, typer.Argument(help="Model directory, or name on the Hub.")],
    *,
    tokens: Annotated[
        str,
        typer.Option(
            help="Tokens per call: the batch size in decode, all tokens of the prompts in prefill."
        ),
    ] = "1,16,256,4096",
    device: Device = "auto",
    verbose: bool = False,
    console: Console,
    **settings: Any,
) -> dict[str, Any]:
    """Say which layers would gain from 2:4 on this machine, before anything is converted.

    Reads the model's config only. On a CUDA device it measures each shape dense and sparse;
    elsewhere it shows the limits that bytes and operations set.

    Example: proxsparse advise ./llama --tokens 1,4096
    """
    check_model(model)
    from proxsparse.jobs.advise import advise as run

    quiet_transformers()
    try:
        numbers = [int(number) for number in split_list([tokens])]
    except ValueError as error:
        raise ProxsparseError(
            f"--tokens is {tokens!r}: give whole numbers with commas between"
        ) from error
    given = {name: tuple(value) for name, value in settings.items() if value}
    result = run(model, tokens=numbers, device=device, **given)
    measured, whole = result["measured"], result["model"]
    shown = "speedup" if measured else "byte_limit"
    title = "{} tokens, x (predicted)" if measured else "bytes, {} tokens"
    columns = [title.format(m) for m in numbers] + ([] if measured else ["operations"])
    table = show.columns("layer shape", "layers", "dense", "packed", *columns)
    for row in result["shapes"]:
        limit = [] if measured else [f"{row['operation_limit']:.2f}"]
        table.add_row(
            show.shape(row["shape"]),
            str(row["layers"]),
            show.size(row["dense_bytes"]),
            show.size(row["packed_bytes"]),
            *(f"{row[shown][m]:.2f}{_predicted(row, m)}" for m in numbers),
            *limit,
        )
    console.print(table)
    if measured:
        speedups = ", ".join(f"{whole['speedup'][m]:.2f}x at {m}" for m in numbers)
        console.print(f"measured on {result['device']} in {result['dtype']}, eager calls")
        console.print(f"all layers and the lm_head together: {speedups}", highlight=False)
    else:
        console.print(
            "There is no CUDA device, so nothing can be measured here. The figures are limits, not "
            "speed-ups: a layer gains at most the figure of what binds it, the bytes it moves when "
            "tokens are few, its operations when they are many.",
            highlight=False,
        )
    console.print(
        f"limits of the whole model, attention apart: {whole['byte_limit']:.2f}x where bytes bind "
        f"(decode), {whole['operation_limit']:.2f}x where operations bind (prefill); "
        f"weights {show.size(whole['dense_bytes'])} -> {show.size(whole['packed_bytes'])}",
        highlight=False,
    )
    for line in (*_alternative_lines(result["alternatives"]), *_tuning_lines(result["tuning"])):
        console.print(line, highlight=False, markup=False)
    show.left_dense(console, result["left_dense"], verbose)
    return result


def _alternative_lines(forms: dict[str, dict[str, float]]) -> Iterator[str]:
    """What else could be done with the layers, where it would be the better choice."""
    limits = ", ".join(
        f"{name} {form['byte_limit']:.2f}x and {form['operation_limit']:.2f}x"
        for name, form in forms.items()
    )
    yield f"limits of other forms, of bytes and of operations, computed: {limits}"
    yield (
        "To decode one sequence at a time, where bytes bind, dense INT4 (AWQ, GPTQ) is the better "
        "choice: it is smaller than any 2:4 form here. FP8 and 2:4 (pack --quantize FP8_DYNAMIC) "
        "is for prompts and large batches, on GPUs with FP8 tensor cores."
    )


def _predicted(row: dict[str, Any], tokens: int) -> str:
    predicted = (row["predicted"] or {}).get(tokens)
    return "" if predicted is None else f" ({predicted:.2f})"


def _tuning_lines(tuning: dict[str, Any] | None) -> Iterator[str]:
    """What the tuner did, and what it could not measure or must not use."""
    if tuning is None:
        return
    yield (
        f"tuning: {tuning['num_measured']} cells measured, {tuning['num_known']} known before, "
        f"{tuning['num_late']} left to predictions when the time was up, "
        f"{tuning['seconds']:.0f} s"
    )
    for cell in tuning["late"]:
        yield f"late: {cell}"
    for cell, reason in tuning["problems"].items():
        yield f"not measured: {cell} ({reason})"
    for candidate, reason in tuning["banned"].items():
        yield f"not used: {candidate} ({reason})"


@command
def generate(
    model: Annotated[str, typer.Argument(help="A pruned model, dense or packed.")],
    *,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 32,
    compare: Annotated[
        bool, typer.Option("--compare/--sparse-only", help="Run the dense model first, too.")
    ] = True,
    keep_dense: KeepDense = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Fuse small kernels first; takes a minute or more.")
    ] = False,
    device: Device = "auto",
    console: Console,
) -> dict[str, Any]:
    """Continue a prompt with the model dense and sparse, and show both speeds side by side.

    Decoding is greedy, so both give the same tokens unless rounding tips a near tie.

    Example: proxsparse generate ./llama-2to4 --prompt "Once upon a time"
    """
    check_model(model)
    from proxsparse.jobs.generate import generate as run

    quiet_transformers()
    result = run(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        compare=compare,
        keep_dense=keep_dense,
        compile=compile,
        device=device,
    )
    table = show.columns(
        *("weights", "bytes", "tokens", "seconds", "tokens/s", "prefill s", "decode tokens/s")
    )
    for kind, figures in result["runs"].items():
        table.add_row(
            kind,
            show.size(figures["weight_bytes"]),
            str(figures["num_tokens"]),
            f"{figures['seconds']:.2f}",
            f"{figures['tokens_per_second']:.1f}",
            f"{figures['prefill_seconds']:.3f}",
            show.or_dash(figures["decode_tokens_per_second"], ".1f"),
        )
    console.print(prompt + result["runs"]["sparse"]["text"], markup=False, highlight=False)
    console.print(table)
    console.print(
        f"{result['sparse_layers']} sparse layers on {result['device']}, multiplied by the "
        f"{result['backend']} backend",
        highlight=False,
    )
    for kind, figures in result["runs"].items():
        console.print(f"{kind} decoded by {figures['decoding']}", markup=False, highlight=False)
    if result["backend"] == "reference":
        console.print("The reference is correct, not fast: its speed says nothing about 2:4.")
    if compare:
        agree = "agree" if result["same_tokens"] else "differ"
        console.print(f"the tokens of dense and sparse {agree}")
    return result


@command
def inspect_(
    model: Annotated[str, typer.Argument(help="Model directory, or name on the Hub.")],
    *,
    base: Annotated[
        str | None, typer.Option(help="The dense model it came from, to compare kept weights with.")
    ] = None,
    verbose: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Show each layer's shape, 2:4 validity, zeros and overlap with magnitude pruning."""
    check_model(model)
    if base is not None:
        check_model(base)
    from proxsparse.jobs.inspect import inspect_model

    quiet_transformers()
    result = inspect_model(model, base)
    table = show.columns("layer", "shape", "2:4", "zeros", "as magnitude", "bitwise")
    rows = [
        (
            row["name"],
            show.shape(row["shape"]),
            "yes" if row["is_2to4"] else "no",
            f"{row['zeros']:.1%}",
            show.or_dash(row["overlap_with_magnitude"], ".1%"),
            {None: "-", True: "yes", False: "no"}[row["kept_bitwise"]],
        )
        for row in result["layers"]
    ]
    show.layers(console, table, rows, verbose)
    show.line(
        console,
        "as magnitude: share of kept weights that magnitude keeps too; bitwise: whether kept "
        "weights are those of --base",
    )
    for row in result["layers"]:
        if row["negative_zeros"]:
            show.line(console, f"{row['name']} has {row['negative_zeros']:,} zeros that are -0.0")
    odd = [row["name"] for row in result["layers"] if not row["is_2to4"]]
    packed = f", {result['num_packed']} of them packed" if result["num_packed"] else ""
    show.line(console, f"{result['num_2to4']} of {result['num_layers']} layers are 2:4{packed}")
    if odd and result["num_2to4"]:
        show.line(console, f"not 2:4: {', '.join(odd if verbose else odd[:5])}")
    if result["mask_file"]:
        show.line(console, f"the mask file beside it {result['mask_file']}")
    return result


@command
@settings(("Evaluation", EvalConfig))
def eval_(
    models: Annotated[
        list[str],
        typer.Argument(help="Model directories, or names on the Hub; several are compared."),
    ],
    *,
    console: Console,
    **settings: Any,
) -> dict[str, Any]:
    """Measure perplexity on a text, and lm-eval tasks if asked for.

    Example: proxsparse eval ./llama ./llama-2to4 --data wikitext2 --tasks arc_easy,piqa --limit 200
    """
    config = replace(
        EvalConfig(),
        {k: tuple(v) if k == "tasks" else v for k, v in settings.items() if v is not None},
    )
    for model in models:
        check_model(model)
    if config.data is not None:
        check_text(config.data)
    from proxsparse.jobs.compare import evaluate_models

    quiet_transformers()
    results = evaluate_models(models, config)
    first = next(iter(results.values()))
    for table in show.figures(results):
        console.print(table)
    if "source" in first:
        show.line(
            console,
            f"on {first['tokens']:,} tokens of {first['source']}, "
            + ("rolling windows" if config.rolling else "blocks")
            + f" of {first['max_seq_length']:,}",
        )
    if first.get("prefix"):
        where = "the text" if config.rolling else "each block"
        prefix = " ".join(first["prefix"])
        show.line(console, f"before {where}: {prefix}, which the tokenizer adds")
    return first if len(results) == 1 else {"models": results}


@command
def env(*, verbose: bool = False, console: Console) -> dict[str, Any]:
    """Show versions, devices, and which backend runs each op here, or why not."""
    from proxsparse.jobs.environment import describe_environment

    result = describe_environment()
    for name, version in result["versions"].items():
        show.line(console, f"{name:14} {version}")
    show.line(console, f"{'devices':14} {'; '.join(result['devices'])}")
    for name, description in result["cuda"].items():
        show.line(console, f"{'cuda ' + name:17} {description}")
    show.backends(console, result["ops"])
    return result


@command
def demo(
    *,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Directory to create [default: none].")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A shorter run, of about a minute.")
    ] = False,
    console: Console,
) -> dict[str, Any]:
    """Learn and compare masks on a small model that ships with the package; needs no network."""
    if output is not None:
        check_output(output)
    from proxsparse.jobs.demo import run_demo

    quiet_transformers()
    logging.getLogger("proxsparse").setLevel(logging.WARNING)  # its runs are not the user's
    return run_demo(console, output, quick=quick)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from proxsparse import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the `proxsparse` command."""
    choose_wait_policy()
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
