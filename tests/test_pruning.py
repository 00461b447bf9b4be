"""The whole job on the demo model: what is written, what is refused, what survives a kill."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import proxsparse
from proxsparse import Masks, ProxsparseError
from proxsparse.jobs.output import output_directory
from proxsparse.jobs.prune import apply

DEMO = Path(proxsparse.__file__).parent / "demo_model"
FAST: dict[str, Any] = {"steps": 4, "batch_size": 2, "max_seq_length": 32, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(Path(json.__file__).read_text() * 2)
    return path


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: Any, text: Path) -> tuple[Path, Any]:
    output = tmp_path_factory.mktemp("pruned") / "model"
    return output, proxsparse.prune(DEMO, output, calibration=text, **FAST)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_directory_is_complete_and_loads_anywhere(pruned: Any) -> None:
    output, result = pruned
    names = {path.name for path in output.iterdir()}
    assert names >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "proxsparse.masks",
        "proxsparse.json",
        "metrics.jsonl",
        "training.png",
    }
    assert "checkpoints" not in names and not output.with_name("model.partial").exists()
    base = AutoModelForCausalLM.from_pretrained(DEMO, dtype="auto").state_dict()
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert AutoTokenizer.from_pretrained(output)("x = 1").input_ids
    for name, w in model.state_dict().items():
        assert w.dtype == base[name].dtype == torch.bfloat16
        if name in result.masks:
            kept = result.masks[name]
            assert torch.equal(w[kept], base[name][kept])
            assert (w[~kept] == 0).all() and not w[~kept].signbit().any()
        else:
            assert torch.equal(w, base[name]), name
    assert len(result.masks) == 42


def test_report_tells_the_provenance(pruned: Any, text: Path) -> None:
    output, result = pruned
    report = json.loads((output / "proxsparse.json").read_text())
    assert report == json.loads(json.dumps(result.report))
    assert report["data"]["tokens"] == 4 * 2 * 32 and report["data"]["samples"] == 8
    assert report["recipe"]["steps"] == 4 and report["recipe"]["method"] == "gates"
    assert set(report["left_dense"]) == {"model.embed_tokens", "lm_head"}
    assert report["versions"]["torch"] == torch.__version__
    assert all(0 <= layer["overlap_with_magnitude"] <= 1 for layer in report["layers"])
    metadata = Masks.load(output / "proxsparse.masks").metadata
    assert metadata["base_fingerprint"] == report["base"]["fingerprint"]
    assert json.loads(metadata["recipe"])["calibration"] == str(text)
    assert (output / "proxsparse.masks").stat().st_size < 42 * 200 + 2_436_000 / 8


def test_apply_is_bit_identical(pruned: Any, tmp_path: Path) -> None:
    output, _ = pruned
    apply(DEMO, output / "proxsparse.masks", tmp_path / "again")
    again = tmp_path / "again"
    assert digest(again / "model.safetensors") == digest(output / "model.safetensors")
    first, second = (Masks.load(d / "proxsparse.masks") for d in (output, again))
    assert first.metadata == second.metadata and first.shapes == second.shapes
    assert all(torch.equal(first.codes[name], second.codes[name]) for name in first)


def test_apply_refuses_another_base(pruned: Any, tmp_path: Path) -> None:
    output, _ = pruned
    mask = output / "proxsparse.masks"
    with pytest.raises(ProxsparseError, match=r"was made for .* with weights .* --force"):
        apply(output, mask, tmp_path / "a")
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.partial").exists()
    apply(output, mask, tmp_path / "a", force=True)
    assert digest(tmp_path / "a/model.safetensors") == digest(output / "model.safetensors")


def test_learn_masks_equals_prune(pruned: Any, text: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype="auto")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    masks = proxsparse.learn_masks(model, text, tokenizer, **FAST)
    assert {k: v.tolist() for k, v in masks.codes.items()} == {
        k: v.tolist() for k, v in pruned[1].masks.codes.items()
    }
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(ProxsparseError, match="mask_only=True"):
        proxsparse.learn_masks(model, text, tokenizer, method="sparsegpt")


def test_learn_masks_from_texts_and_batches() -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    texts = [Path(json.__file__).read_text()] * 3
    assert len(proxsparse.learn_masks(model, texts, tokenizer, method="wanda", max_seq_length=16))
    batches = [torch.randint(3, 4000, (4, 32)) for _ in range(40)]
    assert len(proxsparse.learn_masks(model, batches, method="wanda", max_seq_length=32))


def test_magnitude_needs_no_data(tmp_path: Path) -> None:
    result = proxsparse.prune(DEMO, tmp_path / "m", method="magnitude")
    assert result.report["data"] is None and result.history == []
    assert all(layer["overlap_with_magnitude"] == 1 for layer in result.report["layers"])


@pytest.mark.parametrize("method", ["gates", "proxsparse"])
def test_killed_run_resumes_to_the_same_masks(tmp_path: Path, text: Path, method: str) -> None:
    """SIGKILL between checkpoints; resumed, it must end bitwise where an undisturbed run does."""
    settings = {**FAST, "steps": 16}
    undisturbed = proxsparse.prune(
        DEMO, tmp_path / "whole", calibration=text, method=method, **settings
    )
    output = tmp_path / "killed"
    code = (
        "import torch, proxsparse; torch.set_num_threads(1);"
        f"proxsparse.prune({str(DEMO)!r}, {str(output)!r}, calibration={str(text)!r},"
        f" method={method!r}, **{settings!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed.partial/checkpoints"
    deadline = time.monotonic() + 120
    while not any(checkpoints.glob("step-0000000[4-9].safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    with pytest.raises(ProxsparseError, match=r"unfinished run lies in .*--resume"):
        proxsparse.prune(DEMO, output, calibration=text, method=method, **settings)
    with pytest.raises(ProxsparseError, match="another model, text or settings"):
        proxsparse.prune(
            DEMO, output, calibration=text, method=method, resume=True, **{**settings, "lam": 4.0}
        )
    resumed = proxsparse.prune(
        DEMO, output, calibration=text, method=method, resume=True, **settings
    )
    assert digest(output / "model.safetensors") == digest(tmp_path / "whole/model.safetensors")
    assert [r["step"] for r in resumed.history] == [r["step"] for r in undisturbed.history]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magnit"}, "unknown method 'magnit'"),
        ({"preset": "llama-9"}, "unknown preset 'llama-9': choose one of llama-2-7b"),
        ({"steps": 0}, "--steps is 0: it must be at least 1"),
        ({"lam2": 1.0}, "lam2 is not used by method 'gates', only by proxsparse"),
        ({"method": "wanda", "steps": 5}, "steps is not used by method 'wanda'"),
        ({"method": "magnitude", "calibration": "c4"}, "calibration is not used by method"),
        ({"stepps": 5}, "unknown setting 'stepps': did you mean steps"),
        ({"preset": "llama-2-7b", "method": "gates"}, "is for method 'proxsparse', not 'gates'"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used here"),
        ({**FAST, "dtype": "int8"}, "--dtype is 'int8': choose auto, float32"),
        ({**FAST, "dtype": "float16"}, "would round"),
        ({"targets": ("nothing",)}, "nothing"),
        ({"targets": "q_proj"}, "--targets is 'q_proj' \\(str\\): it must be a list"),
    ],
)
def test_bad_settings(tmp_path: Path, text: Path, settings: dict[str, Any], message: str) -> None:
    if settings.get("method") != "magnitude":
        settings = {"calibration": text, **settings}
    with pytest.raises(ProxsparseError, match=message):
        proxsparse.prune(DEMO, tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: shutil.rmtree(d), "is not a directory"),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "model.safetensors").unlink(), "cannot be loaded as a causal language"),
        (lambda d: os.truncate(d / "model.safetensors", 1000), "cannot be loaded as a causal"),
        (lambda d: (d / "config.json").write_text('{"model_type": "vit"}'), "cannot be loaded"),
        (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
    ],
)
def test_bad_models(tmp_path: Path, prepare: Any, message: str) -> None:
    directory = tmp_path / "base"
    shutil.copytree(DEMO, directory)
    prepare(directory)
    with pytest.raises(ProxsparseError, match=message):
        proxsparse.prune(directory, tmp_path / "out", method="magnitude")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_non_finite_weights_are_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype="auto")
    model.model.layers[2].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(tmp_path / "base")
    with pytest.raises(ProxsparseError, match=r"layers.2.mlp.up_proj has 1 weights that are NaN"):
        proxsparse.prune(tmp_path / "base", tmp_path / "out", method="magnitude")


def test_output_must_be_new_or_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with output_directory(tmp_path / "empty") as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "empty/file").read_text() == "x"
    with pytest.raises(ProxsparseError, match="exists and is not empty"):
        with output_directory(tmp_path / "empty"):
            pass
    (tmp_path / "plain").write_text("x")
    with pytest.raises(ProxsparseError, match="exists and is not empty"):
        with output_directory(tmp_path / "plain"):
            pass
    with pytest.raises(ProxsparseError, match="cannot be made"):
        with output_directory(tmp_path / "plain/inside"):
            pass


def test_full_disk_leaves_nothing_that_looks_finished(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ProxsparseError, match=r"could not be written.*No space left"):
        proxsparse.prune(DEMO, tmp_path / "out", method="magnitude")
    assert list(tmp_path.iterdir()) == []
