"""What the README says is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree() -> set[str]:
    """The paths named in the annotated tree."""
    block = README.split("## What is where")[1].split("```")[1]
    paths, parent = set(), ""
    for line in filter(None, block.splitlines()):
        name = line.split()[0]
        if line.startswith(" "):
            paths.add(parent + name)
        else:
            parent = name
            paths.add(name)
    return paths


def test_annotated_tree_is_complete_and_true() -> None:
    listed = tree()
    for path in listed:
        target = ROOT / path
        assert target.is_dir() if path.endswith("/") else target.is_file(), path
    package = ROOT / "proxsparse"
    modules = {f"proxsparse/{path.name}" for path in package.glob("*.py")}
    assert modules - {"proxsparse/__init__.py"} <= listed
    folders = {f"proxsparse/{path.name}/" for path in package.iterdir() if path.is_dir()}
    assert {f for f in folders if "__" not in f} <= listed


def test_first_screen_names_the_two_commands() -> None:
    top = "\n".join(README.splitlines()[:15])
    assert "make demo" in top and "make test" in top
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:", rules, re.M) and re.search(r"^test:", rules, re.M)


@pytest.mark.parametrize(
    "name",
    ["prune", "pack", "unpack", "advise", "generate", "apply", "inspect", "eval", "env", "demo"],
)
def test_every_command_is_listed(name: str) -> None:
    from proxsparse.cli import app

    assert f"`proxsparse {name}" in README
    assert name in {command.name for command in app.registered_commands}


def test_python_example_uses_what_exists() -> None:
    import proxsparse

    example = README.split("```python")[1].split("```")[0]
    for name in re.findall(r"proxsparse\.(\w+)\(", example):
        assert name in proxsparse.__all__


def test_no_unfilled_tables() -> None:
    assert "<!--" not in README
