"""The text of Python's own standard library: a corpus that every machine with Python already has.

It lets the demo calibrate and evaluate without a download. Modules are split once and for all into
"train" (the demo model's training text, and calibration) and "heldout" (evaluation only); the split
follows the module's name, so it is the same on every Python version and installation.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Literal

from proxsparse.errors import ProxsparseError

Part = Literal["train", "heldout", "tests"]

# Not the library's: what was installed on top of it, or written by the build of this interpreter.
_INSTALLED = re.compile(r"site-packages|dist-packages|config-.*|_sysconfigdata.*|sitecustomize\.py")
# Useless for language modelling. encodings and pydoc_data are tables and documentation generated
# into literals, a fifth of the whole by size; __hello__ and __phello__ are import fixtures; lib2to3
# carries its own forks of tokenize and friends, so near-copies would stand on both sides of the
# split.
_EXCLUDED = {"encodings", "pydoc_data", "__hello__.py", "__phello__", "lib2to3"}
_TESTS = {"test", "tests", "idle_test"}

# This salt holds out 14 modules, none of them large, and shares at most 4 % of their lines with the
# rest on Python 3.10 to 3.13; it keeps texts that moved (sre_parse.py to re/, ast.py to
# _ast_unparse.py) in one part. Changing it invalidates the demo model.
_SALT = "stdlib-4"
_HELDOUT_SHARE = 0.06
# A whole library holds about 10 million characters besides its tests.
_MIN_CHARACTERS = 1_000_000


def stdlib_texts(part: Part, root: str | PathLike[str] | None = None) -> list[tuple[str, str]]:
    r"""The modules of one part of the standard library.

    Whole top-level modules and packages are held out, about 6 % of the text. Files that are not
    UTF-8 are left out.

    Args:
        part: "train" and "heldout" are disjoint and together the library without its tests; "tests"
            is the library's test suite, where installed, without files that repeat a held-out one.
        root: the library's directory; None means that of the running interpreter.

    Returns:
        (path relative to root with forward slashes, text with "\n" line ends), sorted by path.

    Raises:
        ProxsparseError: unknown part, or the directory holds too little source text, as when the
            library ships as a zip file or as .pyc files only.
    """
    if part not in ("train", "heldout", "tests"):
        raise ProxsparseError(f"part is {part!r}: it must be 'train', 'heldout' or 'tests'")
    directory = Path(sysconfig.get_path("stdlib") if root is None else root)
    library: dict[str, str] = {}
    tests: dict[str, str] = {}
    for path in _source_files(directory):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few tests of source encodings
            continue
        folders = path.relative_to(directory).parts[:-1]
        name = path.relative_to(directory).as_posix()
        (tests if _TESTS.intersection(folders) else library)[name] = text

    size = sum(map(len, library.values()))
    if size < _MIN_CHARACTERS:
        raise ProxsparseError(
            f"{directory} holds {size} characters of Python source, but the standard library has "
            f"millions: this Python ships it zipped or compiled. Use a Python that comes with .py "
            "files (python.org, a distribution's full package, conda), or pass a text file"
        )
    heldout = {name: text for name, text in library.items() if _is_heldout(name)}
    if part == "heldout":
        return sorted(heldout.items())
    if part == "train":
        return sorted(library.items() - heldout.items())
    repeated = set(heldout.values())
    return sorted((name, text) for name, text in tests.items() if text not in repeated)


def _source_files(directory: Path) -> Iterator[Path]:
    """The library's .py files in any order; site-packages, which can be huge, is not entered."""
    for entry in directory.iterdir() if directory.is_dir() else ():
        if _INSTALLED.fullmatch(entry.name) or entry.name in _EXCLUDED:
            continue
        if entry.is_dir():
            yield from entry.rglob("*.py")
        elif entry.suffix == ".py":
            yield entry


def _is_heldout(name: str) -> bool:
    """Decides by the top-level module, so that a module turned into a package stays on its side.

    Leading underscores and `_py` go first: datetime.py became _pydatetime.py, and _compression.py
    became compression/, with the same text.
    """
    module = re.sub(r"^_+(py_?)?", "", name.split("/")[0].removesuffix(".py"))
    digest = hashlib.sha256(f"{_SALT}/{module}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < _HELDOUT_SHARE * 2**64
