"""The forms of the JSON that proxsparse reads back: checked once, and typed from then on.

Every such file may come from a stranger or a broken disk. A form is a dataclass; `checked` compares
a value with its annotations and names the first field that is missing or of another kind. Nothing
is converted: "4" is not 4. Fields that a form does not name are left alone: newer versions may have
more.
"""

from __future__ import annotations

import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from proxsparse.errors import ProxsparseError
from proxsparse.models.files import read_json

_MOST_LAYERS = 2048  # a model is built layer by layer before its weights are looked for
_MOST_OF_ANYTHING = 2**40
_MOST = 2**48  # no side of a tensor is larger; keeps products of sides from growing without bound


@dataclass(frozen=True)
class _Is:
    """A rule beyond the type, in `Annotated`."""

    holds: Callable[[Any], bool]
    text: str


class _Json:
    """In `Annotated`: a string that holds JSON of the annotated type."""


def _between(low: float, high: float) -> _Is:
    return _Is(lambda value: low <= value <= high, f"it has to be from {low} to {high}")


def _digits(pattern: str) -> _Is:
    return _Is(
        lambda value: re.fullmatch(pattern, value) is not None, "it has to be a whole number"
    )


Side = Annotated[int, _between(0, _MOST)]
Shape = Annotated[
    list[Side], _Is(lambda value: 1 <= len(value) <= 8, "it has to have 1 to 8 sides")
]


@dataclass(frozen=True)
class LayerEntry:
    """One layer in a report."""

    name: str
    shape: Shape
    overlap_with_magnitude: Annotated[float, _between(0, 1)] | None = None


@dataclass(frozen=True)
class Report:
    """`proxsparse.json`, as far as any command relies on it."""

    format: str
    storage: Literal["dense", "packed", ""] = "dense"
    layers: list[LayerEntry] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MaskHeader:
    """The metadata of a mask file; safetensors knows strings only, so values are JSON in them."""

    format: str
    # Keys are looked up among a model's own; they are never patterns, paths or code.
    shapes: Annotated[dict[str, Shape], _Json]
    recipe: Annotated[dict[str, Any], _Json] = field(default_factory=dict)
    base_id: str = ""
    base_fingerprint: str = ""
    weights_updated: Annotated[bool, _Json] = False


@dataclass(frozen=True)
class CheckpointHeader:
    """The metadata of a checkpoint: of one that a single process wrote, or of a part."""

    step: Annotated[str, _digits(r"[0-9]{1,9}")]
    recipe: str
    part: Annotated[str, _digits(r"[0-9]{1,5}")] = "0"
    parts: Annotated[str, _digits(r"[1-9][0-9]{0,4}")] = "1"


@dataclass(frozen=True)
class RunMarker:
    """The marker in an unfinished output: whose it is.

    Attributes:
        format: of the marker.
        identity: hash of model, text and settings; empty until they are known.
        finished: all that is missing is the final name.
        host: where the run was started.
        pid: its process there.
    """

    format: Literal["proxsparse-run-1"] = "proxsparse-run-1"
    identity: str = ""
    finished: bool = False
    host: str = ""
    pid: int = 0


READABLE_FORMATS = (1, 2)  # of packed models in 16 bits; the first has no empty `weight`
FP8_FORMAT = 3  # of those with 8-bit values, which earlier versions would misread


@dataclass(frozen=True)
class PackedEntry:
    """The `quantization_config` of a packed model."""

    layers: list[str]
    memory: str | None = None
    keep_dense: bool = False
    scheme: str | None = None
    format_version: int = 1
    quant_method: str = ""


_F = TypeVar("_F")


def checked(form: type[_F], value: Any, name: str) -> _F:
    """A JSON value as `form`.

    Args:
        form: a dataclass of this module.
        value: the parsed JSON.
        name: what an error calls it.

    Raises:
        ProxsparseError: names the first field that is missing or of another kind.
    """
    try:
        read: _F = _read(form, value, ())
    except (_Wrong, RecursionError) as error:
        why = error if isinstance(error, _Wrong) else "is nested too deeply"
        raise ProxsparseError(f"{name} {why}: it is damaged, or of another kind") from error
    return read


class _Wrong(Exception):
    def __init__(self, place: tuple[str, ...], rule: str) -> None:
        shown = ".".join(place) or "as a whole"
        shown = shown if len(shown) <= 120 else shown[:120] + "..."
        super().__init__(f"has a field of the wrong form ({shown}: {rule})")


def _read(hint: Any, value: Any, place: tuple[str, ...]) -> Any:
    """`value` as the annotation says, with dataclasses in the place of objects."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Annotated:
        return _read_annotated(arguments[0], arguments[1:], value, place)
    if kind in (types.UnionType, typing.Union):  # T | None, the only one there is
        return None if value is None else _read(arguments[0], value, place)
    if kind is Any:
        return value
    if kind is Literal:
        if not any(type(value) is type(known) and value == known for known in arguments):
            raise _Wrong(place, f"it has to be one of {', '.join(map(repr, arguments))}")
        return value
    if is_dataclass(kind):
        return _read_form(kind, value, place)
    allowed = (int, float) if kind is float else (kind,)
    if type(value) not in allowed:  # so that True is no number
        raise _Wrong(place, f"it has to be {_JSON_NAMES[kind]}")
    if kind is list:
        return [_read(arguments[0], x, (*place, str(i))) for i, x in enumerate(value)]
    if kind is dict:
        return {key: _read(arguments[1], x, (*place, key)) for key, x in value.items()}
    if kind is float and not math.isfinite(value):
        raise _Wrong(place, "it has to be finite")
    return value


_JSON_NAMES = {
    **{str: "a string", int: "a whole number", float: "a number"},
    **{bool: "true or false", list: "a list", dict: "an object"},
}


def _read_annotated(hint: Any, rules: tuple[Any, ...], value: Any, place: tuple[str, ...]) -> Any:
    if _Json in rules:
        try:
            value = json.loads(_read(str, value, place))
        except ValueError:
            raise _Wrong(place, "it has to be JSON") from None
    read = _read(hint, value, place)
    for rule in rules:
        if isinstance(rule, _Is) and not rule.holds(read):
            raise _Wrong(place, rule.text)
    return read


def _read_form(form: Any, value: Any, place: tuple[str, ...]) -> Any:
    if type(value) is not dict:
        raise _Wrong(place, "it has to be an object")
    found = {}
    for known in fields(form):
        if known.name in value:
            hint = _annotations(form)[known.name]
            found[known.name] = _read(hint, value[known.name], (*place, known.name))
        elif known.default is MISSING and known.default_factory is MISSING:
            raise _Wrong((*place, known.name), "it is missing")
    return form(**found)


@functools.cache
def _annotations(form: Any) -> dict[str, Any]:
    return typing.get_type_hints(form, include_extras=True)


def read_report(directory: Path) -> dict[str, Any] | None:
    """The `proxsparse.json` of a directory, checked; None when there is none.

    Raises:
        ProxsparseError: it is damaged.
    """
    path = directory / "proxsparse.json"
    if not path.is_file():
        return None
    value = read_json(path)
    checked(Report, value, str(path))
    return dict(value)


def check_config(model: Path) -> None:
    """Refuse the config.json of a local model before a library builds what it says.

    Args:
        model: a directory or a config.json; another name is left to the Hub.

    Raises:
        ProxsparseError: it is no JSON object, or holds a number that no model has.
    """
    path = model / "config.json" if model.is_dir() else model
    if not path.is_file():
        return
    value = read_json(path)
    if not isinstance(value, dict):
        raise ProxsparseError(f"{path} holds no JSON object: it is no model's config")
    _check_numbers(value, path)


def _check_numbers(config: dict[str, Any], path: Path) -> None:
    for key, value in config.items():
        most = _MOST_LAYERS if "layer" in key else _MOST_OF_ANYTHING
        if isinstance(value, int | float) and not -_MOST_OF_ANYTHING <= value <= most:
            raise ProxsparseError(
                f"{path} says {key} is {value}, more than the {most:,} that any model has: it is "
                "damaged"
            )
        if isinstance(value, dict):
            _check_numbers(value, path)
