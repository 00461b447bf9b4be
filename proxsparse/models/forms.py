"""The forms of the JSON that proxsparse reads back: checked once, and typed from then on.

Every such file may come from a stranger or a broken disk. pydantic names the field and the rule;
here its finding becomes one sentence. Nothing is converted: "4" is not 4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Json, TypeAdapter, ValidationError

from proxsparse.errors import ProxsparseError
from proxsparse.models.files import read_json

_MOST_LAYERS = 2048  # a model is built layer by layer before its weights are looked for
_MOST_OF_ANYTHING = 2**40
_MOST = 2**48  # no side of a tensor is larger; keeps products of sides from growing without bound
Side = Annotated[int, Field(strict=True, ge=0, le=_MOST)]
Shape = Annotated[list[Side], Field(min_length=1, max_length=8)]
# Keys are looked up among a model's own; they are never patterns, paths or code.
Shapes = TypeAdapter(dict[str, Shape])


class _Form(BaseModel):
    """A form whose further fields are kept as they are: newer versions may have more."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class LayerEntry(_Form):
    """One layer in a report."""

    name: str
    shape: Shape
    overlap_with_magnitude: Annotated[float, Field(ge=0, le=1)] | None = None


class Report(_Form):
    """`proxsparse.json`, as far as any command relies on it."""

    format: str
    storage: Literal["dense", "packed", ""] = "dense"
    layers: list[LayerEntry] = []
    left_dense: dict[str, str] = {}


class MaskHeader(_Form):
    """The metadata of a mask file; safetensors knows strings only, so values are JSON in them."""

    format: str
    shapes: Json[dict[str, Shape]]
    recipe: Json[dict[str, Any]] = {}
    base_id: str = ""
    base_fingerprint: str = ""
    weights_updated: Json[bool] = False


class CheckpointHeader(_Form):
    """The metadata of a checkpoint: of one that a single process wrote, or of a part."""

    step: Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
    recipe: str
    part: Annotated[str, Field(pattern=r"^[0-9]{1,5}$")] = "0"
    parts: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}$")] = "1"


class RunMarker(_Form):
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


class PackedEntry(_Form):
    """The `quantization_config` of a packed model."""

    layers: list[str]
    memory: str | None = None
    keep_dense: bool = False
    format_version: int = 1
    quant_method: str = ""


_F = TypeVar("_F", bound=_Form)


def checked(form: type[_F], value: Any, name: str) -> _F:
    """A JSON value as `form`.

    Args:
        form: what it must be.
        value: the parsed JSON.
        name: what an error calls it.

    Raises:
        ProxsparseError: names the first field that is missing or of another kind.
    """
    try:
        return form.model_validate(value)
    except (ValidationError, RecursionError) as error:
        raise ProxsparseError(f"{name} {_why(error)}: it is damaged, or of another kind") from error


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


def _why(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"])) or "as a whole"
    shown = place if len(place) <= 120 else place[:120] + "..."
    return f"has a field of the wrong form ({shown}: {first['msg']})"
