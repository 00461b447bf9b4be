"""The split of the standard library: disjoint, stable, honest about what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxsparse.data.corpus import _is_heldout, stdlib_texts
from proxsparse.errors import ProxsparseError


def fake_library(root: Path) -> None:
    filler = "x = 1\n" * 200_000
    files = {
        "argparse.py": filler,
        "json/decoder.py": "decoder",
        "urllib/parse.py": "held out",
        "test/test_json.py": "a test",
        "test/copy.py": "held out",
        "site-packages/torch/big.py": "not the library",
        "encodings/cp1252.py": "a table",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "latin.py").write_bytes(b"# \xe9\n")


def test_parts_are_disjoint_and_exclude_what_is_not_the_library(tmp_path: Path) -> None:
    fake_library(tmp_path)
    parts: dict[Any, list[str]] = {
        part: [name for name, _ in stdlib_texts(part, tmp_path)]
        for part in ("train", "heldout", "tests")
    }
    assert parts["train"] == ["argparse.py", "json/decoder.py"]
    assert parts["heldout"] == ["urllib/parse.py"]
    assert parts["tests"] == ["test/test_json.py"]  # the copy of a held-out text is left out


def test_this_library_splits_as_documented() -> None:
    train, heldout = dict(stdlib_texts("train")), dict(stdlib_texts("heldout"))
    assert not train.keys() & heldout.keys()
    share = sum(map(len, heldout.values())) / sum(map(len, (train | heldout).values()))
    assert 0.03 < share < 0.1
    assert "argparse.py" in train and "csv.py" in heldout


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("datetime.py", "_pydatetime.py"),
        ("zipfile.py", "zipfile/__init__.py"),
        ("_compression.py", "compression/_common.py"),
    ],
)
def test_moved_modules_stay_on_their_side(one: str, other: str) -> None:
    assert _is_heldout(one) == _is_heldout(other)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ProxsparseError, match="ships it zipped or compiled"):
        stdlib_texts("train", tmp_path)
    with pytest.raises(ProxsparseError, match="part is 'all'"):
        stdlib_texts("all")  # type: ignore[arg-type]
