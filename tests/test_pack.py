"""A pruned checkpoint to a packed one and back, and what reads the packed one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import proxsparse
from proxsparse import Masks, ProxsparseError, SparseLinear
from proxsparse.config import EvalConfig
from proxsparse.jobs.compare import evaluate_models
from proxsparse.jobs.inspect import inspect_model
from proxsparse.jobs.pack import pack, unpack

DEMO = Path(proxsparse.__file__).parent / "demo_model"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: Any) -> Path:
    output: Path = tmp_path_factory.mktemp("pruned") / "model"
    proxsparse.prune(DEMO, output, method="magnitude")
    return output


@pytest.fixture(scope="module")
def packed(pruned: Path, tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("packed") / "model"
    return output, pack(pruned, output)


def test_directory_is_complete_and_smaller(pruned: Path, packed: Any) -> None:
    output, result = packed
    assert {path.name for path in pruned.iterdir()} <= {path.name for path in output.iterdir()}
    assert len(result["layers"]) == 42 and set(result["left_dense"]) == {
        "model.embed_tokens",
        "lm_head",
    }
    assert result["packed_bytes"] / result["dense_bytes"] == 0.5625
    before, after = result["checkpoint_bytes"]
    saved = result["dense_bytes"] - result["packed_bytes"]
    assert before - after == saved
    sizes = [(d / "model.safetensors").stat().st_size for d in (pruned, output)]
    assert abs(sizes[0] - sizes[1] - saved) < 20_000  # headers
    tensors = load_file(output / "model.safetensors")
    assert not any(tensors[f"{layer['name']}.weight"].numel() for layer in result["layers"])
    layer = result["layers"][0]
    n, k = layer["shape"]
    assert tensors[f"{layer['name']}.values"].shape == (n, k // 2)
    assert tensors[f"{layer['name']}.codes"].shape == (n, k // 8)
    assert not output.with_name("model.partial").exists()


def test_report_keeps_the_provenance(pruned: Path, packed: Any) -> None:
    output, result = packed
    before = json.loads((pruned / "proxsparse.json").read_text())
    after = json.loads((output / "proxsparse.json").read_text())
    assert after.pop("packed") == result and after["storage"] == "packed"
    assert {**after, "storage": "dense"} == before


def test_unpacking_gives_the_same_bytes(pruned: Path, packed: Any, tmp_path: Path) -> None:
    result = unpack(packed[0], tmp_path / "dense")
    assert len(result["layers"]) == 42
    assert result["checkpoint_bytes"] == packed[1]["checkpoint_bytes"][::-1]
    names = {path.name for path in pruned.iterdir()}
    assert names == {path.name for path in (tmp_path / "dense").iterdir()}
    for name in names:
        assert (tmp_path / "dense" / name).read_bytes() == (pruned / name).read_bytes(), name


def test_loads_as_a_sparse_model_that_computes_the_same(pruned: Path, packed: Any) -> None:
    dense = AutoModelForCausalLM.from_pretrained(pruned, dtype="auto")
    sparse = AutoModelForCausalLM.from_pretrained(packed[0], dtype="auto")
    assert sum(isinstance(m, SparseLinear) for m in sparse.modules()) == 42
    x = AutoTokenizer.from_pretrained(packed[0])("import os\n", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(sparse(x).logits, dense(x).logits)


def test_inspect_and_eval_read_it(pruned: Path, packed: Any, tmp_path: Path) -> None:
    seen, of_dense = inspect_model(packed[0], base=DEMO), inspect_model(pruned, base=DEMO)
    assert seen.pop("num_packed") == 42 and of_dense.pop("num_packed") == 0
    assert seen == of_dense and seen["mask_file"] == "matches"
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text()[:4000])
    figures = [
        evaluate_models([str(d)], EvalConfig(data=str(text), max_seq_length=64, device="cpu"))[
            str(d)
        ]
        for d in (packed[0], pruned)
    ]
    assert figures[0] == figures[1]


def test_a_partly_pruned_model_names_what_stays_dense(tmp_path: Path) -> None:
    proxsparse.prune(DEMO, tmp_path / "part", method="magnitude", ignore=("down_proj",))
    result = pack(tmp_path / "part", tmp_path / "packed", keep_dense=True)
    assert len(result["layers"]) == 36
    assert "not 2:4: row 0" in result["left_dense"]["model.layers.0.mlp.down_proj"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert model.model.layers[0].mlp.up_proj.keep_dense


def test_refusals_leave_nothing_behind(packed: Any, tmp_path: Path) -> None:
    for job, directory, message in (
        (pack, DEMO, "no layer of LlamaForCausalLM can be sparse"),
        (pack, packed[0], "is packed already"),
        (unpack, DEMO, "is not packed"),
        (pack, tmp_path / "nowhere", "is not a directory"),
    ):
        with pytest.raises(ProxsparseError, match=message):
            job(directory, tmp_path / "out")
    with pytest.raises(ProxsparseError, match="make it dense first"):
        proxsparse.prune(packed[0], tmp_path / "out", method="magnitude")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_our_report_gets_a_short_one(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned, tmp_path / "bare")
    for name in ("proxsparse.json", "proxsparse.masks"):
        (tmp_path / "bare" / name).unlink()
    pack(tmp_path / "bare", tmp_path / "packed")
    report = json.loads((tmp_path / "packed/proxsparse.json").read_text())
    assert report["storage"] == "packed" and len(report["packed"]["layers"]) == 42
    assert inspect_model(tmp_path / "packed")["num_2to4"] == 42


def test_masks_travel_along(pruned: Path, packed: Any) -> None:
    a, b = (Masks.load(d / "proxsparse.masks") for d in (pruned, packed[0]))
    assert all(torch.equal(a[name], b[name]) for name in a)
