"""Finds cuSPARSELt, loads it into the extension once, and says which one it is.

The library is not linked: PyTorch's CUDA builds depend on its wheel, but which version that is, and
in which folder, differs. Looked at in this order, and the first that loads is taken:

1. the file named by the environment variable PROXSPARSE_CUSPARSELT, and then nothing else,
2. what `cuda.pathfinder` finds, if it is installed,
3. the wheels on `sys.path`, in both of their layouts,
4. a copy that this process has loaded already,
5. the system's loader.

Importing this module raises ImportError, with the reason, when the extension was not built.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from proxsparse.backends.build_notes import why_left_out
from proxsparse.errors import ProxsparseError

try:
    from proxsparse import _cuda
except ImportError as error:
    _reason = why_left_out("cuda") or str(error)
    raise ImportError(f"the CUDA extension was not built: {_reason}") from error

extension: Any = _cuda  # for those who import it through here, and so get the reason
VARIABLE = "PROXSPARSE_CUSPARSELT"
_NAME = "libcusparseLt.so.0"
_WHEEL_FOLDERS = ("nvidia/cu13/lib", "nvidia/cusparselt/lib")  # since 0.10, and before


class Library(NamedTuple):
    """The loaded library: where it came from and its (major, minor, patch)."""

    path: str
    version: tuple[int, int, int]

    @property
    def version_text(self) -> str:
        """The version as people write it."""
        return ".".join(map(str, self.version))


def candidates() -> Iterator[str]:
    """Paths to try, best first; the last is a bare name for the system's loader."""
    named = os.environ.get(VARIABLE)
    if named:
        yield os.path.abspath(named)
        return
    folders = [_pathfinder_folder()]
    folders += [Path(entry, folder) for folder in _WHEEL_FOLDERS for entry in sys.path]
    for folder in folders:
        if folder is not None and (folder / _NAME).is_file():
            yield str((folder / _NAME).resolve())
    yield from _loaded_copies()
    yield _NAME


def _pathfinder_folder() -> Path | None:
    """The folder of the library beside the header that cuda.pathfinder locates.

    Its own loading function is not used: it makes the library's names global to the process.
    """
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        include = find_nvidia_header_directory("cusparseLt")
    except (ImportError, RuntimeError):  # absent, or older than cuSPARSELt's place in it
        return None
    return Path(include).parent / "lib" if include else None


def _loaded_copies() -> list[str]:
    """Copies of the library that are mapped into this process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = (line.split(maxsplit=5)[5:] for line in maps.read_text().splitlines())
    return sorted({path[0] for path in paths if path and Path(path[0]).name.startswith(_NAME)})


@functools.cache
def find_library() -> Library | str:
    """The library, loaded; or in words why there is none. Searched for once per process."""
    reasons = []
    for path in dict.fromkeys(candidates()):
        try:
            return Library(path, extension.load_cusparselt(path))
        except RuntimeError as error:
            reasons.append(str(error))
    return (
        f"cuSPARSELt cannot be loaded ({'; '.join(reasons)}): install the nvidia-cusparselt wheel "
        f"of your CUDA version or name the file in {VARIABLE}"
    )


def library() -> Library:
    """The library, loaded.

    Raises:
        ProxsparseError: there is none that can be used; every place that was tried is named.
    """
    found = find_library()
    if isinstance(found, str):
        raise ProxsparseError(found)
    return found


def version_warning(version: tuple[int, int, int], capability: tuple[int, int]) -> str:
    """What a user of this version on a GPU of this compute capability should know; else empty."""
    if version == (0, 8, 0) and capability[0] == 9:
        return (
            "cuSPARSELt 0.8.0 is slower than it should be on Hopper; its release notes name 0.8.1 "
            "as the fix"
        )
    return ""
