"""Why a part of the extension was not built: setup.py leaves a note beside the package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def why_left_out(part: str) -> str:
    """The reason that setup.py wrote down; empty if the part was built, or nothing is known.

    Args:
        part: "cpu", "cuda" or "cuda_kernels".
    """
    note = _PACKAGE / f"_build_error_{part}.txt"
    return note.read_text(encoding="utf-8").strip() if note.exists() else ""
