"""What can be refused at once: mistakes that need no model, found before torch is imported.

The jobs make the same checks; the command line makes them first.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxsparse.errors import ProxsparseError
from proxsparse.jobs.recipe import make_recipe
from proxsparse.learning.launcher import require_one_process
from proxsparse.methods import RECOVERY
from proxsparse.models.files import looks_like_path, model_name, read_json

if TYPE_CHECKING:
    from proxsparse.models.forms import RunMarker

# The name of an unfinished output, and of the file in it that says whose it is.
PARTIAL = ".partial"
MARKER = "proxsparse-run.json"


def check_prune(
    model: str,
    output: str,
    *,
    method: str | None,
    preset: str | None,
    resume: bool,
    **settings: Any,
) -> None:
    """Settings, model and output of a pruning job.

    Raises:
        ProxsparseError: bad settings, a path that leads nowhere, an output that cannot be made.
    """
    recipe = make_recipe(method, preset, **settings)
    if not recipe.method.can_share:
        require_one_process(f"method {recipe.method.name}")
    if recipe.method.needs_data:
        _check_text(recipe.calibration.calibration)
    check_model(model)
    check_output(output, resume=resume)


def check_recover(
    model: str, base: str, output: str | None, *, resume: bool, **settings: Any
) -> str:
    """Settings, models and output of a recovery; returns where the output goes.

    Raises:
        ProxsparseError: as for `check_prune`, or a setting that a recovery has no use for.
    """
    recipe = make_recipe(RECOVERY, **recovery_settings(settings))
    _check_text(recipe.calibration.calibration)
    check_model(model)
    check_model(base)
    output = recovery_output(model) if output is None else output
    check_output(output, resume=resume)
    return output


def recovery_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recovery, without those that were not given.

    Raises:
        ProxsparseError: one that it has no use for.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    for key in ("targets", "ignore", "lam", "random_init", "quantize"):
        if given.pop(key, None):
            raise ProxsparseError(f"{key} is not used by recover: drop it")
    return given


def recovery_output(model: str | os.PathLike[str]) -> str:
    """Where a recovered model goes if nothing is said: beside the pruned one."""
    return os.path.normpath(os.path.expanduser(os.fspath(model))) + "-recovered"


def _check_text(source: str) -> None:
    if looks_like_path(source):
        check_file(source, "calibration text", or_directory=True)


def check_model(model: str | os.PathLike[str]) -> None:
    """A model's name.

    Raises:
        ProxsparseError: it looks like a path, and no model lies there.
    """
    model_name(model)


def check_file(path: str, what: str, *, or_directory: bool = False) -> None:
    """A file that is read.

    Raises:
        ProxsparseError: it is not there.
    """
    found = Path(path).expanduser()
    if not (found.is_file() or (or_directory and found.is_dir())):
        raise ProxsparseError(f"there is no {what} {path}: give the path of an existing file")


def check_text(name: str) -> None:
    """A text to measure on, by path or name.

    Raises:
        ProxsparseError: neither a file or folder nor a name that a dataset could have.
    """
    is_name = name in ("stdlib", "wikitext2", "c4", "self") or (
        name.count("/") == 1 and not looks_like_path(name) and not Path(name).suffix
    )
    if not is_name:
        check_file(name, "text", or_directory=True)


def read_settings(path: str, flags: Collection[str]) -> dict[str, Any]:
    """The values of a command's flags that a file gives.

    Args:
        path: YAML or JSON, a mapping of flags without their dashes; or a `proxsparse.json`, of
            which the recipe counts.
        flags: names of the command's flags, with underscores.

    Returns:
        Flag, with underscores -> value; those that are null are left out.

    Raises:
        ProxsparseError: no such file, no mapping, or a key that is no flag.
    """
    check_file(path, "file of settings")
    import yaml

    try:
        values = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ProxsparseError(f"{path} cannot be read as YAML or JSON: {reason}") from error
    if isinstance(values, dict) and isinstance(values.get("recipe"), dict):
        values = values["recipe"]
    if not isinstance(values, dict):
        raise ProxsparseError(f"{path} holds no mapping: write one flag a line, such as steps: 200")
    found = {}
    for key, value in values.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in flags:
            close = difflib.get_close_matches(name, sorted(flags), n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(flags))}"
            raise ProxsparseError(f"{path} sets {key!r}, which is no flag of this command: {hint}")
        if value is not None:
            found[name] = value
    return found


def check_output(output: str | os.PathLike[str], *, resume: bool = False) -> None:
    """The place of a job's result; makes nothing.

    Args:
        output: the directory to create.
        resume: whether an unfinished run of ours may lie beside it.

    Raises:
        ProxsparseError: it is taken, cannot be replaced or written, or something lies at
            `OUTPUT.partial` that is not ours or would be lost.
    """
    final = final_path(output)
    try:
        _check_final(final, output)
        _check_partial(partial_path(final), resume)
    except OSError as error:
        raise ProxsparseError(f"the output directory {output} cannot be made: {error}") from error


def _check_final(final: Path, output: str | os.PathLike[str]) -> None:
    if final.is_symlink():
        raise ProxsparseError(
            f"{output} is a link, which a result cannot replace: give the path that it leads to"
        )
    # With a marker it is a result of ours that was renamed, but not tidied up: see `output`.
    taken = final.exists() and (not final.is_dir() or any(final.iterdir()))
    if taken and not (final / MARKER).is_file():
        raise ProxsparseError(
            f"{output} exists and is not empty: choose another --output or remove it first"
        )
    if final.is_dir() and os.path.ismount(final):
        raise ProxsparseError(
            f"{output} is a mount point, which a result cannot replace: give a new name inside it"
        )
    check_writable(next(p for p in final.parents if p.exists()), output)


def _check_partial(partial: Path, resume: bool) -> None:
    if not (partial.exists() or partial.is_symlink()):
        return
    if not is_ours(partial):
        raise ProxsparseError(
            f"{partial} exists and is no unfinished run of this version of proxsparse: move it "
            "away, or choose another --output"
        )
    if not resume and worth_keeping(partial):
        raise ProxsparseError(
            f"an unfinished run lies in {partial}: continue it with --resume, or remove it"
        )


def final_path(output: str | os.PathLike[str]) -> Path:
    """The absolute path of a result.

    Raises:
        ProxsparseError: no path, or one without a name of its own.
    """
    try:
        final = Path(os.path.abspath(Path(output).expanduser()))
        os.stat(partial_path(final)) if final.name else None
    except (FileNotFoundError, NotADirectoryError):  # the usual case, and one told better below
        pass
    except (OSError, ValueError, RuntimeError) as error:
        raise ProxsparseError(
            f"the output directory {os.fspath(output)!r} cannot be made: {error}"
        ) from error
    if not os.fspath(output) or not final.name:
        raise ProxsparseError(
            f"--output is {os.fspath(output)!r}: give the name of a new directory"
        )
    return final


def partial_path(final: Path) -> Path:
    """Where the result of `final` grows."""
    return final.with_name(final.name + PARTIAL)


def check_writable(parent: Path, output: str | os.PathLike[str]) -> None:
    """The nearest directory that exists above an output.

    Raises:
        ProxsparseError: it is a file, or may not be written.
    """
    if not parent.is_dir():
        raise ProxsparseError(
            f"the output directory {output} cannot be made: {parent} is not a directory"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ProxsparseError(
            f"the output directory {output} cannot be made: {parent} may not be written by this "
            "user; choose another --output"
        )


def is_ours(partial: Path) -> bool:
    """Whether a directory has the marker of a run, or nothing yet."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    # Another run may be at work: it names the marker before it writes anything else, so that what
    # was listed without one is empty but for what a kill before that has left.
    try:
        names = {path.name for path in partial.iterdir()}
    except FileNotFoundError:  # it has its final name by now
        return True
    return names <= {MARKER, MARKER + ".tmp"} or (partial / MARKER).is_file()


def worth_keeping(partial: Path) -> bool:
    """Whether a directory of ours holds a checkpoint, or a result that only lacks its name."""
    saved = (partial / "checkpoints").glob("step-*")
    return any(path.suffix != ".tmp" for path in saved) or read_marker(partial).finished


def read_marker(partial: Path) -> RunMarker:
    """What the marker of a directory says; an empty one where there is none yet.

    Raises:
        ProxsparseError: it is damaged.
    """
    from proxsparse.models.forms import RunMarker, checked

    path = partial / MARKER
    if not path.is_file():
        return RunMarker()
    return checked(RunMarker, read_json(path), str(path))
