"""Files that others wrote, disks that are full, and names that lead nowhere.

Needs no library, so that what can be refused at once is refused before torch is loaded.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proxsparse.errors import ProxsparseError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What libraries that wrap an OSError in an error of their own leave of it.
_FULL_TEXTS = tuple(os.strerror(number) for number in sorted(_FULL))


def model_name(model: str | os.PathLike[str]) -> str:
    """The name to hand to transformers, once it is not a local path that leads nowhere.

    Args:
        model: a local directory, a config.json, a GGUF file or a name on the Hugging Face Hub.

    Raises:
        ProxsparseError: it looks like a path, and no model lies there.
    """
    name = os.fspath(model)
    try:
        path = Path(name).expanduser()
        looks_local = looks_like_path(name) or path.exists()
        found = path.suffix == ".json" or (path / "config.json").is_file()
        found = found or find_gguf(path) is not None
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, an unknown user
        raise ProxsparseError(f"{name!r} cannot be the name of a model: {error}") from error
    if not looks_local:
        return name
    if not found:
        what = "has no config.json" if path.is_dir() else "is not a directory"
        raise ProxsparseError(
            f"{path} {what}: give the directory of a Hugging Face model, or its name on the Hub"
        )
    return str(path)


def find_gguf(model: Path) -> Path | None:
    """The GGUF file that a path is, or that is all the weights a directory has; else None.

    Raises:
        ProxsparseError: the directory has several, and which one is meant is not known.
    """
    if model.is_file():
        with open(model, "rb") as file:
            return model if file.read(4) == b"GGUF" else None
    if not model.is_dir() or any(model.glob("*.safetensors*")):
        return None
    files = sorted(model.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise ProxsparseError(f"{model} holds several GGUF files ({names}): name the one to read")
    return files[0] if files else None


def looks_like_path(name: str) -> bool:
    """Whether a name can only mean something on this machine; Hub names are `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, says that there is no room to write."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    cause = error.__cause__ or error.__context__
    return any(text in str(error) for text in _FULL_TEXTS) or (
        cause is not None and is_full_disk(cause)
    )


@contextlib.contextmanager
def explaining_full_disk(path: Path, way_out: str) -> Iterator[None]:
    """Turn what any library raises on a full disk into one sentence with the way out.

    Raises:
        ProxsparseError: the disk, the quota or the size limit of a file is exhausted.
    """
    try:
        yield
    except ProxsparseError:
        raise
    except Exception as error:
        if not is_full_disk(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ProxsparseError(f"{path} could not be written ({reason}): {way_out}") from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Wait until a directory with all that is in it is on the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            if not os.path.islink(os.path.join(folder, name)):
                sync(Path(folder, name))
        sync(Path(folder))


def write_text_whole(path: Path, text: str) -> None:
    """Write a file so that its name only ever leads to the old text or to all of the new."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def read_json(path: Path) -> Any:
    """The value that a JSON file holds.

    Raises:
        ProxsparseError: unreadable, not UTF-8, not JSON, or nested beyond all use.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ProxsparseError(f"{path} cannot be read ({error}): it is damaged") from error


def parse_json(text: str, name: str) -> Any:
    """The value of a JSON text; `name` is what an error calls it.

    Raises:
        ProxsparseError: not JSON, or nested beyond all use.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProxsparseError(f"{name} is not JSON ({error}): it is damaged") from error


def check_room(directory: Path, needed: int, what: str) -> None:
    """Refuse a disk that has less room than will surely be needed.

    Args:
        directory: on the disk; must exist.
        needed: bytes.
        what: is to be written there.

    Raises:
        ProxsparseError: names what is needed and what is free.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ProxsparseError(
            f"{what} needs {needed / 1e9:.3f} GB in {directory}, and its disk has {free / 1e9:.3f} "
            "GB left: make room, or choose another --output"
        )
