"""The command line. Flags come from the config dataclasses; each command imports lazily."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import os
import sys
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from proxsparse.config import (
    METHOD_OPTIONS,
    CalibrationConfig,
    LearnConfig,
    RunConfig,
    TargetConfig,
)
from proxsparse.errors import Interrupted, ProcessLost, ProxsparseError

app = typer.Typer(
    name="proxsparse",
    help="Learn 2:4 sparsity masks for Hugging Face causal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
_Output = Annotated[str, typer.Option("--output", "-o", help="Directory to create.")]


def _settings(*groups: tuple[str, type[Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
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
                if field.name not in flags:
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
    option = typer.Option(help=field.metadata["help"] + shown, rich_help_panel=panel)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _command(function: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Turn a function that returns its result into a command that reports it, or the error."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        as_json = kwargs.pop("json", False)
        is_main = os.environ.get("RANK", "0") == "0"  # of the processes of a launcher
        console = Console(stderr=as_json, quiet=not is_main)
        logging.basicConfig(format="%(message)s", level="INFO" if is_main else "ERROR")
        for name in ("httpx", "datasets", "matplotlib"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            result = function(*args, console=console, **kwargs)
        except ProxsparseError as error:
            if is_main or isinstance(error, ProcessLost):
                typer.echo(f"proxsparse: {error}", err=True)
            if as_json and is_main:
                typer.echo(json.dumps({"error": str(error)}))
            raise typer.Exit(130 if isinstance(error, Interrupted) else 1) from error
        if as_json and is_main:
            typer.echo(json.dumps(result))

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
    return app.command(name=function.__name__.rstrip("_"))(run)


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
    method: Annotated[
        str | None, typer.Option(help="gates, proxsparse, sparsegpt, wanda or magnitude.")
    ] = None,
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

    With no flag but --calibration it learns gates on 3,200 blocks of 512 tokens.

    Example: proxsparse prune ./llama --calibration text.txt --output ./llama-2to4
    """
    from proxsparse.pruning import prune as run

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
    console.print(
        f"{report['recipe']['method']}: {len(report['layers'])} layers pruned to 2:4 in "
        f"{report['seconds']:.1f} s, written to {output}",
        highlight=False,
    )
    return {"output": output, **report}


@_command
def apply(
    model: Annotated[str, typer.Argument(help="The base model, directory or Hub name.")],
    *,
    mask: Annotated[str, typer.Option(help="A masks.safetensors file.")],
    output: _Output,
    force: Annotated[
        bool, typer.Option("--force", help="Accept a base model with other weights.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    console: Console,
) -> dict[str, Any]:
    """Put a mask file on its base model, bit-identically to what prune wrote."""
    from proxsparse.pruning import apply as run

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
def inspect_(
    model: Annotated[str, typer.Argument(help="Model directory, or name on the Hub.")],
    *,
    base: Annotated[
        str | None, typer.Option(help="The dense model it came from, to compare kept weights with.")
    ] = None,
    console: Console,
) -> dict[str, Any]:
    """Show each layer's shape, 2:4 validity, zeros and overlap with magnitude pruning."""
    from proxsparse.inspection import inspect_model

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
    console.print(f"{result['num_2to4']} of {result['num_layers']} layers are 2:4", highlight=False)
    if result["mask_file"]:
        console.print(f"the mask file beside it {result['mask_file']}")
    return result


@_command
def eval_(
    model: Annotated[str, typer.Argument(help="Model directory, or name on the Hub.")],
    *,
    data: Annotated[
        str | None,
        typer.Option(help="A text file, or 'stdlib' for held-out modules of Python's library."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="A task of lm-eval; repeat for more.")
    ] = None,
    max_seq_length: Annotated[int, typer.Option(help="Tokens per block.", min=2)] = 512,
    batch_size: Annotated[int, typer.Option(help="Blocks per forward pass.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    console: Console,
) -> dict[str, Any]:
    """Measure perplexity on a text, and lm-eval tasks if asked for."""
    from proxsparse.evaluate import evaluate_model

    _quiet_transformers()
    result = evaluate_model(
        model,
        data,
        tasks or [],
        max_seq_length=max_seq_length,
        batch_size=batch_size,
        device=device,
    )
    if "perplexity" in result:
        console.print(f"perplexity {result['perplexity']:.4f} on {result['tokens']:,} tokens")
    for task, figures in result.get("tasks", {}).items():
        console.print(task, figures)
    return result


@_command
def env(*, console: Console) -> dict[str, Any]:
    """Show versions, devices, and which backend runs each op here, or why not."""
    from proxsparse.environment import describe_environment

    result = describe_environment()
    for name, version in result["versions"].items():
        console.print(f"{name:14} {version}", highlight=False)
    console.print(f"{'devices':14} {'; '.join(result['devices'])}", highlight=False)
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
    quick: Annotated[bool, typer.Option("--quick", help="A short form, under 40 seconds.")] = False,
    console: Console,
) -> dict[str, Any]:
    """Learn and compare masks on a small model that ships with the package; needs no network."""
    from proxsparse.demo import run_demo

    _quiet_transformers()
    return run_demo(console, output, quick=quick)


def _print_layers(console: Console, layers: list[dict[str, Any]], title: str) -> None:
    table = Table("layer", "shape", title)
    for layer in layers:
        overlap = f"{layer['overlap_with_magnitude']:.1%}"
        table.add_row(layer["name"], "x".join(map(str, layer["shape"])), overlap)
    console.print(table)


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
