"""The model card of a result: its metadata, what it says, and whose text is kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import proxsparse
from proxsparse.jobs.card import render_card
from proxsparse.jobs.pack import pack, unpack

DEMO = Path(proxsparse.__file__).parent / "demo_model"
BASE = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# Base\n\nIts own story.\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    shutil.copytree(DEMO, tmp_path / "base")
    (tmp_path / "base/README.md").write_text(BASE)
    return tmp_path / "base"


def prune(base: Path, output: Path) -> str:
    proxsparse.prune(base, output, method="magnitude")
    return (output / "README.md").read_text()


def test_what_a_card_says(base: Path, tmp_path: Path) -> None:
    text = prune(base, tmp_path / "out")
    data = ModelCard(text).data
    assert data.license == "apache-2.0" and data.language == ["en"]
    assert data.library_name == "transformers" and {"2:4", "magnitude"} <= set(data.tags)
    assert data.base_model is None  # a directory of this machine is no name on the Hub
    assert "\n# out\n" in text and "Not measured" in text and "42 linear layers" in text
    assert (tmp_path / "out/README.base.md").read_text() == BASE


def test_the_card_follows_the_storage(base: Path, tmp_path: Path) -> None:
    dense = prune(base, tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "renamed")
    pack(tmp_path / "renamed", tmp_path / "packed")
    packed = (tmp_path / "packed/README.md").read_text()
    assert "loads it as a sparse model" in packed and "license: apache-2.0" in packed
    assert (tmp_path / "packed/README.base.md").read_text() == BASE
    unpack(tmp_path / "packed", tmp_path / "out")
    assert (tmp_path / "out/README.md").read_text() == dense


def test_an_edited_card_is_kept(base: Path, tmp_path: Path) -> None:
    prune(base, tmp_path / "out")
    (tmp_path / "out/README.md").write_text("My words.\n")
    pack(tmp_path / "out", tmp_path / "packed")
    assert (tmp_path / "packed/README.md").read_text() == "My words.\n"
    assert "\n# twice\n" in prune(tmp_path / "out", tmp_path / "twice")
    assert (tmp_path / "twice/README.base.md").read_text() == "My words.\n"


def test_metadata_of_a_stranger_cannot_break_it(base: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    assert "license" not in prune(base, tmp_path / "out").split("---")[1]


def test_base_and_quality_in_the_metadata() -> None:
    quality = {"perplexity": 31.2, "perplexity_dense": 17.25, "tokens": 16384, "source": "a.txt"}
    report: dict[str, Any] = {
        "base": {"id": "org/model", "revision": "abc"},
        "recipe": {"method": "gates", "lr": 0.06, "steps": 400},
        "quality": quality,
        "layers": [{}],
    }
    text = render_card(report, {}, "pruned")
    data = ModelCard(text).data
    assert data.base_model == "org/model"
    assert data.eval_results[0].metric_value == 31.2
    assert "| perplexity | 17.25 | 31.20 |" in text and "| lr | 0.06 |" in text
