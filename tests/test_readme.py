"""What the README says is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree() -> dict[str, str]:
    """Path -> what it is, of the annotated tree."""
    block = README.split("## What is where")[1].split("```")[1]
    return dict(line.split(maxsplit=1) for line in block.splitlines() if line)


def test_annotated_tree_is_complete_and_true() -> None:
    listed = tree()
    assert 12 <= len(listed) <= 20
    for path in listed:
        assert (ROOT / path).is_dir(), path
    rooms = {f"proxsparse/{p.name}/" for p in (ROOT / "proxsparse").iterdir() if p.is_dir()}
    hidden = {"proxsparse/demo_model/", "proxsparse/kernels/"}  # named beside jobs/; a link
    assert {room for room in rooms if "__" not in room} - hidden <= set(listed)
    assert {"kernels/", "csrc/", "benchmarks/", "docs/", "tests/"} <= set(listed)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 160


def test_first_screen_names_the_two_commands() -> None:
    top = "\n".join(README.splitlines()[:15])
    assert "make demo" in top and "make test" in top
    assert "the fast tests; `pytest -m slow` for the rest" in top
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "docs"):
        assert re.search(f"^{target}:", rules, re.M)


def test_first_screen_shows_speed_and_quality() -> None:
    top = README.split("## ")[0]
    pictures = re.findall(r"!\[.+\]\((.+)\)", top)
    assert pictures == ["docs/images/speed.png", "docs/images/quality.png"]
    for word in ("Python", "PyTorch", "transformers", "Hopper", "Ampere"):
        assert word in top


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

    for name in re.findall(r"proxsparse\.(\w+)\(", README):
        assert name in proxsparse.__all__


def test_no_unfilled_tables() -> None:
    assert not re.search(r"-->\s*<!--", README)
