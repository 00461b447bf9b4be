"""The documents say what the code does and what the results hold."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import proxsparse
from proxsparse.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
# Flags of other programs.
OTHERS = {"--nproc-per-node", "--strict", "--check", "--quantization", "--load-format"}
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))
SOURCES = [
    path
    for folder in ("proxsparse", "kernels", "csrc", "tests", "benchmarks", "docs")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".cpp", ".cu", ".h") and path != Path(__file__)
]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A function that imports a script of the benchmarks or the documents by name."""
    for folder in ("benchmarks", "docs"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module


@pytest.fixture
def make_api(script: Callable[[str], Any]) -> Any:
    return script("make_api")


# The page of the Python API


def test_the_api_page_has_every_public_name_once(make_api: Any) -> None:
    names = [name for examples in make_api.SECTIONS.values() for name in examples]
    assert sorted(names) == sorted(proxsparse.__all__)


def test_the_api_page_is_what_its_script_writes(make_api: Any) -> None:
    page = make_api.PAGE.read_text(encoding="utf-8")
    assert page == make_api.page(), "run python docs/make_api.py"


def test_the_examples_of_the_api_page_run(
    make_api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(make_api.SETUP, names)
    for examples in make_api.SECTIONS.values():
        for name, example in examples.items():
            assert name in example or name in ("PruneResult",), example
            exec(compile(example, f"the example of {name}", "exec"), names)


def test_a_docstring_becomes_markdown(make_api: Any) -> None:
    text = (
        "Do it.\n\nArgs:\n    x: what.\n        More: of it.\n    *rest: others.\n\nCost: one pass."
    )
    assert make_api.markdown(text) == (
        "Do it.\n\n**Args:**\n\n- `x`: what.\n  More: of it.\n- `*rest`: others.\n\n"
        "**Cost:** one pass.\n"
    )


# Environment variables


def variables() -> set[str]:
    """PROXSPARSE_* in the Python sources, without macros for the compiler, and all that is read."""
    scripts = [path for path in SOURCES if path.suffix == ".py"] + [ROOT / "setup.py"]
    found = set()
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        found |= set(re.findall(r"(?<!-D)(?<![\w])PROXSPARSE_[A-Z]\w*", text))
        if not path.is_relative_to(ROOT / "tests"):
            found |= set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", text))
    return found


def test_every_environment_variable_is_documented() -> None:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)
    documented = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", " ".join(first_cells)))
    assert {"PROXSPARSE_CACHE", "PROXSPARSE_BUILD", "LOCAL_RANK", "CXX"} <= variables()
    assert variables() <= documented
    ours = {name for name in documented if name.startswith("PROXSPARSE_")}
    assert ours <= variables(), "nothing reads these"


# Results, and what is written of them


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_result_names_its_origin_and_sums_itself_up(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", result["commit"])
    assert result["device"] and result["versions"]
    assert isinstance(result["summary"], dict) and result["summary"]


def test_a_new_result_has_its_date(script: Callable[[str], Any]) -> None:
    run = script("harness").describe_run()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", run["date"])


def test_every_benchmark_that_writes_a_result_sums_it_up() -> None:
    for path in sorted((ROOT / "benchmarks").glob("bench_*.py")):
        text = path.read_text(encoding="utf-8")
        if "describe_run()" in text:
            assert '"summary"' in text, path.name


def test_the_summary_of_the_ceiling_is_computed_from_its_rows(script: Callable[[str], Any]) -> None:
    path = ROOT / "benchmarks/results/h200/prefill_ceiling.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    summarize = script("bench_prefill_ceiling").summarize
    assert summarize(result["rows"]) == result["summary"]


def test_tables_show_what_the_results_hold(script: Callable[[str], Any]) -> None:
    make_tables = script("make_tables")
    shown = set()
    for path in make_tables.DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        shown |= set(re.findall(r"<!-- table (\w+) -->", text))
        assert make_tables.fill(text) == text, "run python benchmarks/make_tables.py"
    assert shown == set(make_tables.TABLES)


def test_every_table_names_card_date_and_commit(script: Callable[[str], Any]) -> None:
    for lines in (write() for write in script("make_tables").TABLES.values()):
        assert re.match(r"(NVIDIA|AMD) .+, \d{4}-\d\d-\d\d, commit [0-9a-f]{7}", lines[0])


def test_the_pictures_are_small_and_drawn_from_the_results(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["plot_readme.py", "--out", str(tmp_path)])
    script("plot_readme").main()
    for name in ("speed.png", "quality.png"):
        committed = ROOT / "docs" / "images" / name
        for path in (tmp_path / name, committed):
            assert path.stat().st_size < 60_000
            assert path.read_bytes().startswith(b"\x89PNG")


# Links and words


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|#", link):
            assert (page.parent / link.split("#")[0]).exists(), link


def test_the_site_has_every_page() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {path.name for path in DOCS} == set(re.findall(r"(\w+\.md)$", menu, re.MULTILINE))


def test_code_files_that_documents_name_exist() -> None:
    """Paths from the root, or from the package."""
    rooms = [path.name for path in (ROOT / "proxsparse").iterdir() if path.is_dir()]
    folders = ("proxsparse", "benchmarks", "docs", "kernels", "tests", "csrc", *rooms)
    pattern = re.compile(rf"`((?:{'|'.join(folders)})/[\w./-]+\.\w+)`")
    for page in PAGES:
        for name in pattern.findall(page.read_text(encoding="utf-8")):
            places = (ROOT / name, ROOT / "proxsparse" / name)
            assert any(place.exists() for place in places), f"{page.name}: {name}"


def test_commands_in_documents_exist_with_their_flags() -> None:
    import typer

    group: Any = typer.main.get_command(app)
    flags = {
        name: {flag for parameter in command.params for flag in parameter.opts}
        | {flag for parameter in command.params for flag in parameter.secondary_opts}
        for name, command in group.commands.items()
    }
    somewhere = set().union(*flags.values()) | {"--version"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for name, rest in re.findall(r"(?:^\$ |`|^|-m )proxsparse (\w+)\b([^`\n]*)", text, re.M):
            assert name in flags, f"{page.name}: proxsparse {name}"
            assert set(re.findall(r"--[a-z-]+", rest)) <= flags[name], f"{page.name}: {name}{rest}"
        ours = set(re.findall(r"`(--[a-z][a-z-]+)", text)) - OTHERS
        assert ours <= somewhere, f"{page.name}: {ours - somewhere}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_in_documents_uses_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(example)
        for name in re.findall(r"\bproxsparse\.(\w+)\(", example):
            assert name in proxsparse.__all__, name
    for name in re.findall(r"`(\w+_)\((?:model|optimizer)", text):
        assert name in proxsparse.__all__, name


def test_the_first_sentences_of_the_readme_quote_the_results() -> None:
    top = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[0]
    folder = ROOT / "benchmarks" / "results"
    quality, model = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["summary"]
        for name in ("h100/mask_quality_smollm2", "h200/model")
    )
    for name in ("dense", "gates", "wanda"):
        assert f"{quality[name]['heldout']:.1f}" in top, name
    gains = [model[f"decode_speedup_b{batch}"] for batch in (1, 8, 32)]
    assert f"{min(gains):.1f} to {max(gains):.1f} times" in top
    assert f"in {model['weight_memory_ratio']:.2f} of the bytes" in top


@pytest.mark.parametrize("words", ["lest", "be they", "be it", "in turn"])
def test_words_that_nobody_says_any_more(words: str) -> None:
    pattern = re.compile(r"\b" + words.replace(" ", r"[\s#/]+") + r"\b", re.IGNORECASE)
    for path in [*SOURCES, *PAGES]:
        found = pattern.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(ROOT)}: {found[0]}"


def test_prefill_is_not_called_reading() -> None:
    pattern = re.compile(r"\b[Rr]eading (?:\d+ tokens|(?:a |the |whole )?prompts?)")
    for path in [*SOURCES, *PAGES]:
        found = pattern.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(ROOT)}: {found[0]}"
