"""What every command has in common: flags made of settings, reports, errors and exit codes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import math
import os
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from proxsparse.config import choices_of, split_list
from proxsparse.errors import Interrupted, ProcessLost, ProxsparseError
from proxsparse.learning import launcher

_IN_SEVERAL_PROCESSES = ("prune", "recover", "env")
_COMMON = "Output"
# Of these, requests and progress of their own would stand between our lines.
_NOISY = ("httpx", "httpx2", "datasets", "huggingface_hub", "matplotlib", "filelock", "urllib3")

app = typer.Typer(
    name="proxsparse",
    help="Learn 2:4 sparsity masks for Hugging Face causal language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Output = Annotated[str, typer.Option("--output", "-o", help="Directory to create.")]
KeepDense = Annotated[
    bool,
    typer.Option(
        "--keep-dense",
        help="Hold the dense weights beside the packed ones, so that no number of tokens need be "
        "slower than dense.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda ...")]


class _GroupedCommand(TyperCommand):
    """A command whose help has a section for each group of options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            is_argument = parameter.param_type_name == "argument"
            title = "Arguments" if is_argument else "Options"
            title = getattr(parameter, "rich_help_panel", None) or title
            sections.setdefault(title, []).append(record)
        sections |= {title: sections.pop(title) for title in (_COMMON,) if title in sections}
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def settings(
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
    is_list = kind == tuple[str, ...]
    default = field.default
    shown = "" if default in (None, ()) else f" [default: {default}]"
    choices = choices_of(kind)  # checked by the config, in the words of every other mistake
    option = typer.Option(
        help=field.metadata["help"] + (" Commas between, or repeated." if is_list else "") + shown,
        rich_help_panel=panel,
        metavar="|".join(choices) or None,
    )
    kind = list[str] if is_list else str if choices else kind
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def command(function: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Turn a function that returns its result into a command that reports it, or the error.

    The function is called with `console`, and with `verbose` if it has such a parameter. Values of
    lists are split at commas.
    """
    name = function.__name__.rstrip("_")
    signature = inspect.signature(function, eval_str=True)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        common = {flag: kwargs.pop(flag) for flag in _COMMON_FLAGS}
        as_json, quiet, verbose = common["json"], common["quiet"], common["verbose"]
        if "verbose" in signature.parameters:
            kwargs["verbose"] = verbose
        kwargs = {k: split_list(v) if isinstance(v, list) else v for k, v in kwargs.items()}
        is_main = True
        try:
            is_main = launcher.is_main()  # of the processes of a launcher
            if name not in _IN_SEVERAL_PROCESSES:
                launcher.require_one_process(f"proxsparse {name}")
            # Names and paths are printed as they are, whatever brackets they hold.
            silent = quiet or not is_main
            console = Console(stderr=as_json, quiet=silent, markup=False, emoji=False)
            _set_up_logs(silent, verbose)
            result = function(*args, console=console, **kwargs)
        except ProxsparseError as error:
            if is_main or isinstance(error, ProcessLost):
                typer.echo(f"proxsparse: {error}", err=True)
            if as_json and is_main:
                typer.echo(json.dumps({"error": str(error)}))
            raise typer.Exit(130 if isinstance(error, Interrupted) else 1) from error
        if as_json and is_main:
            typer.echo(json.dumps(_without_nan(result), allow_nan=False))

    parameters = [p for p in signature.parameters.values() if p.name not in ("console", "verbose")]
    parameters += [
        inspect.Parameter(
            flag,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if flag == "config" else False,
            annotation=kind,
        )
        for flag, kind in _COMMON_FLAGS.items()
    ]
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=None
    )
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return app.command(name=name, cls=_GroupedCommand)(run)


def _read_config(ctx: typer.Context, path: str | None) -> str | None:
    """Make what a file says the defaults of the command's flags."""
    if path is None or ctx.resilient_parsing:
        return path
    from proxsparse.jobs.checks import read_settings

    flags = {p.name for p in ctx.command.params if p.name and p.name != "config"}
    try:
        ctx.default_map = read_settings(path, flags)
    except ProxsparseError as error:
        typer.echo(f"proxsparse: {error}", err=True)
        raise typer.Exit(1) from error
    return path


_COMMON_FLAGS: dict[str, Any] = {
    "config": Annotated[
        str | None,
        typer.Option(
            "--config",
            help="A YAML or JSON file whose keys are flags of this command; a result's "
            "proxsparse.json gives those it was made with. Flags on the command line win.",
            callback=_read_config,
            is_eager=True,
            rich_help_panel=_COMMON,
        ),
    ],
    "json": Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object as the last line.", rich_help_panel=_COMMON
        ),
    ],
    "verbose": Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Show every layer, and debug logs.", rich_help_panel=_COMMON
        ),
    ],
    "quiet": Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", help="Show only warnings and errors.", rich_help_panel=_COMMON
        ),
    ],
}


def _set_up_logs(silent: bool, verbose: bool) -> None:
    """Our lines as they are, of other libraries warnings only, and no progress where silent."""
    logging.basicConfig(format="%(message)s", level="WARNING")
    ours = logging.getLogger("proxsparse")
    ours.setLevel("WARNING" if silent else "DEBUG" if verbose else "INFO")
    logging.getLogger("proxsparse.progress").setLevel("WARNING" if silent else "NOTSET")
    for library in _NOISY:
        logging.getLogger(library).setLevel("ERROR")  # each retry of a download is a warning


def _without_nan(value: Any) -> Any:
    """The value with null for each number that JSON does not have, such as lm-eval's NaN errors."""
    if isinstance(value, dict):
        return {key: _without_nan(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def quiet_transformers() -> None:
    """No advice and no bars of transformers between our lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def choose_wait_policy() -> None:
    """Let idle OpenMP threads sleep, before any library that has some is loaded.

    torch and our extension bring a runtime each, whose threads spin for a while after each loop:
    on cores that are shared, they take the time of those that work.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
