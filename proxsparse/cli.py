"""The command line. Flags come from the config dataclasses; each command imports lazily."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import math
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from proxsparse.config import (
    FP8_DYNAMIC,
    METHOD_OPTIONS,
    CalibrationConfig,
    LearnConfig,
    RunConfig,
    TargetConfig,
    check_scheme,
    choices_of,
)
from proxsparse.errors import Interrupted, ProcessLost, ProxsparseError
from proxsparse.jobs.checks import (
    check_file,
    check_model,
    check_output,
    check_prune,
    check_recover,
)
from proxsparse.learning import launcher

app = typer.Typer(
    name="proxsparse",
    help="Learn 2:4 sparsity masks for Hugging Face causal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_IN_SEVERAL_PROCESSES = ("prune", "recover", "env")
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
_Output = Annotated[str, typer.Option("--output", "-o", help="Directory to create.")]

_KeepDense = Annotated[
    bool,
    typer.Option(
        "--keep-dense",
        help="Hold the dense weights beside the packed ones, so that no number of tokens need be "
        "slower than dense.",
    ),
]


def _settings(
    *groups: tuple[str, type[Any]], without: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one flag for each field of each (panel title, dataclass), default None.

    None means "not given", so that presets and methods can supply their own value; the real default
    is shown in the help.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        flags: dict[str, inspect.Parameter] = {}
        for panel, config in groups:
            hints = typing.get_type_hints(config)
            for field in dataclasses.fields(config):
                if field.name not in (*flags, *without):
                    flags[field.name] = _flag(field, hints[field.name], panel)
        parameters = [*own, *flags.values()]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in parameters}
        return function

    return decorate


def _flag(field: dataclasses.Field[Any], kind: Any, panel: str) -> inspect.Parameter:
    if kind == tuple[str, ...]:
        kind = list[str]
    default = field.default
    shown = "" if default in (None, ()) else f" [default: {default}]"
    choices = choices_of(kind)  # checked by the config, in the words of every other mistake
    option = typer.Option(
        help=field.metadata["help"] + shown,
        rich_help_panel=panel,
        metavar="|".join(choices) or None,
    )
    kind = str if choices else kind
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _command(function: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Turn a function that returns its result into a command that reports it, or the error."""
    name = function.__name__.rstrip("_")

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        as_json = kwargs.pop("json", False)
        is_main = True
        try:
            is_main = launcher.is_main()  # of the processes of a launcher
            if name not in _IN_SEVERAL_PROCESSES:
                launcher.require_one_process(f"proxsparse {name}")
            # Names and paths are printed as they are, whatever brackets they hold.
            console = Console(stderr=as_json, quiet=not is_main, markup=False, emoji=False)
            logging.basicConfig(format="%(message)s", level="INFO" if is_main else "ERROR")
            for library in ("httpx", "datasets", "matplotlib"):
                logging.getLogger(library).setLevel(logging.WARNING)
            result = function(*args, console=console, **kwargs)
        except ProxsparseError as error:
            if is_main or isinstance(error, ProcessLost):
                typer.echo(f"proxsparse: {error}", err=True)
            if as_json and is_main:
                typer.echo(json.dumps({"error": str(error)}))
            raise typer.Exit(130 if isinstance(error, Interrupted) else 1) from error
        if as_json and is_main:
            typer.echo(json.dumps(_without_nan(result), allow_nan=False))

    signature = inspect.signature(function, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.name != "console"]
    flag = inspect.Parameter(
        "json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Json
    )
    parameters.append(flag)
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=None
    )
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return app.command(name=name)(run)


def _without_nan(value: Any) -> Any:
    """The value with null for each number that JSON does not have, such as lm-eval's NaN errors."""
    if isinstance(value, dict):
        return {key: _without_nan(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@_command
@_settings(
    ("Calibration", CalibrationConfig),
    ("Layers", TargetConfig),
    ("Learning", LearnConfig),
    ("Machine", RunConfig),
    *((f"Only for method {name}", config) for name, config in METHOD_OPTIONS.items()),
)
def prune(
    model: Annotated[str, typer.Argument(help="Model directory, or name on the Hub.")],
    *,
    output: _Output,
    method: Annotated[str | None, typer.Option(help=f"One of {', '.join(METHOD_OPTIONS)}.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Published settings of the paper for a model, e.g. llama-2-7b."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of the same job.")
    ] = False,
    console: Console,
    **settings: Any,
) -> dict[str, Any]:
    """Prune a model to 2:4 and write it to a directory.

    With no flag but --calibration it learns gates on 1.6 million tokens; more are better.

    Example: proxsparse prune ./llama --calibration text.txt --tokens 25M --output ./llama-2to4
    """
    check_prune(model, output, method=method, preset=preset, resume=resume, **settings)
    from proxsparse.jobs.prune import prune as run

    _quiet_transformers()
    result = run(model, output, method=method, preset=preset, resume=resume, **settings)
    report = result.report
    if not report:  # not the main process
        return {}
    _print_layers(console, report["layers"], "kept as by magnitude")
    for name, reason in report["left_dense"].items():
        console.print(f"left dense: {name} ({reason})", highlight=False)
    if report["data"]:
        console.print(
            f"calibration: {report['data']['samples']:,} blocks, {report['data']['tokens']:,} "
            f"tokens from {report['data']['source']}",
            highlight=False,
        )
        if report["data"].get("prefix"):
            prefix = " ".join(report["data"]["prefix"])
            console.print(
                f"before each block: {prefix}, which the tokenizer adds",
                markup=False,
                highlight=False,
            )
    console.print(
        f"{report['recipe']['method']}: {len(report['layers'])} layers pruned to 2:4 in "
        f"{report['seconds']:.1f} s, written to {output}",
        highlight=False,
    )
    return {"output": output, **report}


@_command
@_settings(
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

    _quiet_transformers()
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


@_command
def apply(
    model: Annotated[str, typer.Argument(help="The base model, directory or Hub name.")],
    *,
    mask: Annotated[str, typer.Option(help="A proxsparse.masks file, or a directory with one.")],
    output: _Output,
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

    _quiet_transformers()
    report = run(model, mask, output, force=force, device=device).report
    if report["mask_from_updated_weights"]:
        console.print(
            "note: these masks come from a method that also updated the kept weights; here the "
            "kept weights are the base model's"
        )
    console.print(f"{len(report['layers'])} layers pruned to 2:4, written to {output}")
    return {"output": output, **report}


@_command
def pack(
    model: Annotated[str, typer.Argument(help="A pruned model, directory or Hub name.")],
    *,
    output: _Output,
    keep_dense: _KeepDense = False,
    quantize: Annotated[
        str | None, typer.Option(help="Round the packed layers to 8 bits: FP8_DYNAMIC.")
    ] = None,
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

    _quiet_transformers()
    result = run(model, output, keep_dense=keep_dense, quantize=quantize)
    for name, reason in result["left_dense"].items():
        console.print(f"left dense: {name} ({reason})", highlight=False)
    dense, packed = result["dense_bytes"], result["packed_bytes"]
    before, after = map(_size, result["checkpoint_bytes"])
    console.print(
        f"{len(result['layers'])} layers packed: {_size(dense)} -> {_size(packed)} "
        f"({packed / dense:.4f}); with all else {before} -> {after}, written to {output}",
        highlight=False,
    )
    return {"output": output, **result}


@_command
def unpack(
    model: Annotated[str, typer.Argument(help="A packed model, directory or Hub name.")],
    *,
    output: _Output,
    console: Console,
) -> dict[str, Any]:
    """Turn a packed model back into the dense checkpoint with zeros, bit by bit.

    Every program that loads Hugging Face models loads the result.
    """
    check_model(model)
    check_output(output)
    from proxsparse.jobs.pack import unpack as run

    _quiet_transformers()
    result = run(model, output)
    before, after = map(_size, result["checkpoint_bytes"])
    console.print(
        f"{len(result['layers'])} layers unpacked: {before} -> {after}, written to {output}",
        highlight=False,
    )
    return {"output": output, **result}


@_command
@_settings(("Layers", TargetConfig))
def export(
    model: Annotated[str, typer.Argument(help="A model, dense or packed, directory or Hub name.")],
    *,
    output: _Output,
    format: Annotated[str, typer.Option(help="FP8_DYNAMIC.")] = FP8_DYNAMIC,
    console: Console,
    **settings: Any,
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

    _quiet_transformers()
    given = {name: tuple(value) for name, value in settings.items() if value}
    result = run(model, output, format=format, **given)
    before, after = map(_size, result["checkpoint_bytes"])
    console.print(
        f"{len(result['layers'])} layers in {format}, {result['num_2to4']} of them 2:4; "
        f"{before} -> {after}, written to {output}",
        highlight=False,
    )
    return {"output": output, **result}


@_command
@_settings(("Layers", TargetConfig))
def advise(
    model: Annotated[str, typer.Argument(help="Model directory, or name on the Hub.")],
    *,
    tokens: Annotated[
        str,
        typer.Option(
            help="Tokens per call: the batch size in decode, all tokens of the prompts in prefill."
        ),
    ] = "1,16,256,4096",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
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

    _quiet_transformers()
    try:
        numbers = [int(number) for number in tokens.split(",")]
    except ValueError as error:
        raise ProxsparseError(
            f"--tokens is {tokens!r}: give whole numbers with commas between"
        ) from error
    given = {name: tuple(value) for name, value in settings.items() if value}
    result = run(model, tokens=numbers, device=device, **given)
    measured, whole = result["measured"], result["model"]
    shown = "speedup" if measured else "byte_limit"
    title = "{} tokens, x" if measured else "bytes, {} tokens"
    columns = [title.format(m) for m in numbers] + ([] if measured else ["operations"])
    table = Table("layer shape", "layers", "dense", "packed", *columns)
    for row in result["shapes"]:
        limit = [] if measured else [f"{row['operation_limit']:.2f}"]
        table.add_row(
            "x".join(map(str, row["shape"])),
            str(row["layers"]),
            _size(row["dense_bytes"]),
            _size(row["packed_bytes"]),
            *(f"{row[shown][m]:.2f}" for m in numbers),
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
        f"weights {_size(whole['dense_bytes'])} -> {_size(whole['packed_bytes'])}",
        highlight=False,
    )
    for line in (*_alternative_lines(result["alternatives"]), *_tuning_lines(result["tuning"])):
        console.print(line, highlight=False, markup=False)
    for name, reason in result["left_dense"].items():
        console.print(f"left dense: {name} ({reason})", highlight=False)
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


def _tuning_lines(tuning: dict[str, Any] | None) -> Iterator[str]:
    """What the tuner did, and what it could not measure or must not use."""
    if tuning is None:
        return
    yield (
        f"tuning: {tuning['num_measured']} cells measured, {tuning['num_known']} known before, "
        f"{tuning['num_late']} left to the rule when the time was up"
    )
    for cell, reason in tuning["problems"].items():
        yield f"not measured: {cell} ({reason})"
    for candidate, reason in tuning["banned"].items():
        yield f"not used: {candidate} ({reason})"


@_command
def generate(
    model: Annotated[str, typer.Argument(help="A pruned model, dense or packed.")],
    *,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 32,
    compare: Annotated[
        bool, typer.Option("--compare/--sparse-only", help="Run the dense model first, too.")
    ] = True,
    keep_dense: _KeepDense = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Fuse small kernels first; takes a minute or more.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    console: Console,
) -> dict[str, Any]:
    """Continue a prompt with the model dense and sparse, and show both speeds side by side.

    Decoding is greedy, so both give the same tokens unless rounding tips a near tie.

    Example: proxsparse generate ./llama-2to4 --prompt "Once upon a time"
    """
    check_model(model)
    from proxsparse.jobs.generate import generate as run

    _quiet_transformers()
    result = run(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        compare=compare,
        keep_dense=keep_dense,
        compile=compile,
        device=device,
    )
    table = Table(
        *("weights", "bytes", "tokens", "seconds", "tokens/s", "prefill s", "decode tokens/s")
    )
    for kind, figures in result["runs"].items():
        table.add_row(
            kind,
            _size(figures["weight_bytes"]),
            str(figures["num_tokens"]),
            f"{figures['seconds']:.2f}",
            f"{figures['tokens_per_second']:.1f}",
            f"{figures['prefill_seconds']:.3f}",
            _or_dash(figures["decode_tokens_per_second"], ".1f"),
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


@_command
def inspect_(
    model: Annotated[str, typer.Argument(help="Model directory, or name on the Hub.")],
    *,
    base: Annotated[
        str | None, typer.Option(help="The dense model it came from, to compare kept weights with.")
    ] = None,
    console: Console,
) -> dict[str, Any]:
    """Show each layer's shape, 2:4 validity, zeros and overlap with magnitude pruning."""
    check_model(model)
    if base is not None:
        check_model(base)
    from proxsparse.jobs.inspect import inspect_model

    _quiet_transformers()
    result = inspect_model(model, base)
    table = Table("layer", "shape", "2:4", "zeros", "-0.0", "kept as by magnitude", "kept bitwise")
    for row in result["layers"]:
        table.add_row(
            row["name"],
            "x".join(map(str, row["shape"])),
            "yes" if row["is_2to4"] else "no",
            f"{row['zeros']:.1%}",
            str(row["negative_zeros"]),
            _or_dash(row["overlap_with_magnitude"], ".1%"),
            {None: "-", True: "yes", False: "no"}[row["kept_bitwise"]],
        )
    console.print(table)
    packed = f", {result['num_packed']} of them packed" if result["num_packed"] else ""
    console.print(
        f"{result['num_2to4']} of {result['num_layers']} layers are 2:4{packed}", highlight=False
    )
    if result["mask_file"]:
        console.print(f"the mask file beside it {result['mask_file']}")
    return result


@_command
def eval_(
    model: Annotated[str, typer.Argument(help="Model directory, or name on the Hub.")],
    *,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text: a file or folder as for prune --calibration, or 'stdlib' for held-out "
            "modules of Python's library."
        ),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column that holds the text of a table (default: found).")
    ] = None,
    rolling: Annotated[
        bool,
        typer.Option("--rolling", help="Score every token once, in lm-eval's rolling windows."),
    ] = False,
    tasks: Annotated[
        list[str] | None, typer.Option(help="A task of lm-eval; repeat for more.")
    ] = None,
    max_seq_length: Annotated[int, typer.Option(help="Tokens per block.", min=2)] = 512,
    batch_size: Annotated[int, typer.Option(help="Blocks per forward pass.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    console: Console,
) -> dict[str, Any]:
    """Measure perplexity on a text, and lm-eval tasks if asked for."""
    check_model(model)
    if data not in (None, "stdlib"):
        check_file(data, "text", or_directory=True)
    from proxsparse.jobs.evaluate import evaluate_model

    _quiet_transformers()
    result = evaluate_model(
        model,
        data,
        tasks or [],
        max_seq_length=max_seq_length,
        batch_size=batch_size,
        device=device,
        rolling=rolling,
        text_column=text_column,
    )
    if "perplexity" in result:
        console.print(f"perplexity {result['perplexity']:.4f} on {result['tokens']:,} tokens")
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        if name in result:
            console.print(f"{name.replace('_', ' ')} {result[name]:.4f}")
    if result.get("prefix"):
        where = "the text" if rolling else "each block"
        console.print(
            f"before {where}: {' '.join(result['prefix'])}, which the tokenizer adds",
            markup=False,
            highlight=False,
        )
    for task, figures in result.get("tasks", {}).items():
        console.print(task, figures)
    return result


@_command
def env(*, console: Console) -> dict[str, Any]:
    """Show versions, devices, and which backend runs each op here, or why not."""
    from proxsparse.jobs.environment import describe_environment

    result = describe_environment()
    for name, version in result["versions"].items():
        console.print(f"{name:14} {version}", highlight=False)
    console.print(f"{'devices':14} {'; '.join(result['devices'])}", highlight=False)
    for name, description in result["cuda"].items():
        console.print(f"{'cuda ' + name:17} {description}", highlight=False)
    table = Table("op", *next(iter(result["ops"].values())))
    for op, backends in result["ops"].items():
        table.add_row(op, *backends.values())
    console.print(table)
    return result


@_command
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

    _quiet_transformers()
    logging.getLogger("proxsparse").setLevel(logging.WARNING)  # its runs are not the user's
    return run_demo(console, output, quick=quick)


def _print_layers(console: Console, layers: list[dict[str, Any]], title: str) -> None:
    table = Table("layer", "shape", title)
    for layer in layers:
        overlap = f"{layer['overlap_with_magnitude']:.1%}"
        table.add_row(layer["name"], "x".join(map(str, layer["shape"])), overlap)
    console.print(table)


def _size(num_bytes: int) -> str:
    """Bytes in the unit that suits them, e.g. 13.5 GB."""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.{0 if unit == 'B' else 1}f} {unit}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


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
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
