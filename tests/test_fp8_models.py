"""FP8 on disk: dense checkpoints of scheme FP8_DYNAMIC, packed ones, and the ways between them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import proxsparse
from proxsparse import ProxsparseError, ops
from proxsparse.config import EvalConfig
from proxsparse.inference.sparse_linear import sparse_layers
from proxsparse.jobs.compare import evaluate_models
from proxsparse.jobs.generate import generate
from proxsparse.jobs.inspect import inspect_model
from proxsparse.jobs.pack import pack, unpack
from proxsparse.models.fp8 import find_entry
from proxsparse.models.loading import load_model
from proxsparse.ops import FP8, reference

DEMO = Path(proxsparse.__file__).parent / "demo_model"
SCHEME = "FP8_DYNAMIC"
CPU = torch.device("cpu")
UP = "model.layers.0.mlp.up_proj"
ENTRY: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
                "group_size": None,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
            "output_activations": None,
        }
    },
}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def quantize_files(source: Path, output: Path, stretch: float = 1.0) -> Path:
    """The checkpoint as FP8_DYNAMIC ones are; scales are in bfloat16, `stretch` times the usual."""
    shutil.copytree(source, output)
    for name in ("proxsparse.json", "proxsparse.masks"):
        (output / name).unlink(missing_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, w in load_file(source / "model.safetensors").items():
        tensors[name] = w
        if "proj" in name:
            scale = (w.float().abs().amax(-1) / 448 * stretch).bfloat16()
            tensors[name] = ops.quantize_fp8(w, scale.float())[0]
            tensors[f"{name}_scale"] = scale.unsqueeze(-1)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    set_entry(output, ENTRY)
    return output


def set_entry(directory: Path, entry: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = entry
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: Any) -> Path:
    output: Path = tmp_path_factory.mktemp("pruned") / "model"
    proxsparse.prune(DEMO, output, method="magnitude")
    return output


@pytest.fixture(scope="module")
def packed(pruned: Path, tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    output: Path = tmp_path_factory.mktemp("packed") / "model"
    return output, pack(pruned, output, quantize=SCHEME)


@pytest.fixture(scope="module")
def fp8_pruned(pruned: Path, tmp_path_factory: Any) -> Path:
    return quantize_files(pruned, tmp_path_factory.mktemp("fp8") / "model", stretch=0.9)


def test_packing_rounds_the_weights_of_the_files(pruned: Path, packed: Any) -> None:
    output, result = packed
    assert len(result["layers"]) == 42
    # 0.3125 and the scales: 4 bytes a row of some hundred columns.
    assert 0.3125 < result["packed_bytes"] / result["dense_bytes"] < 0.325
    before, after = load_file(pruned / "model.safetensors"), load_file(output / "model.safetensors")
    values, scale = ops.quantize_fp8(before[f"{UP}.weight"])
    kept, codes = ops.pack_2to4(values)
    assert torch.equal(bits(after[f"{UP}.values"]), bits(kept))
    assert torch.equal(after[f"{UP}.codes"], codes)
    assert torch.equal(after[f"{UP}.weight_scale"], scale) and after[f"{UP}.weight"].numel() == 0
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    entry = json.loads((output / "config.json").read_text())["quantization_config"]
    assert entry["scheme"] == SCHEME and entry["format_version"] == 3
    report = json.loads((output / "proxsparse.json").read_text())
    assert report["storage"] == "packed" and report["packed"] == result


def test_loads_as_a_sparse_model_in_fp8(packed: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed[0], dtype="auto")
    layers = sparse_layers(model)
    assert len(layers) == 42 and {layer.values.dtype for layer in layers.values()} == {FP8}


def test_unpacking_gives_the_rounded_weights(pruned: Path, packed: Any, tmp_path: Path) -> None:
    unpack(packed[0], tmp_path / "dense")
    before = load_file(pruned / "model.safetensors")
    after = load_file(tmp_path / "dense" / "model.safetensors")
    assert set(before) == set(after)
    for name, w in before.items():
        expected = w
        if "proj" in name:
            expected = reference.dequantize_fp8(*ops.quantize_fp8(w), w.dtype)
        assert torch.equal(after[name], expected) and after[name].dtype == w.dtype, name
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    pack(tmp_path / "dense", tmp_path / "again", quantize=SCHEME)
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, x in load_file(packed[0] / "model.safetensors").items():
        assert torch.equal(bits(again[name]), bits(x)), name


def test_inspect_eval_and_generate_read_packed_fp8(
    pruned: Path, packed: Any, tmp_path: Path
) -> None:
    seen = inspect_model(packed[0])
    assert (seen["num_packed"], seen["num_2to4"], seen["mask_file"]) == (42, 42, "matches")
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text()[:4000])
    config = EvalConfig(data=str(text), max_seq_length=64, device="cpu")
    figures = evaluate_models([str(pruned), str(packed[0])], config).values()
    perplexities = [of_one["perplexity"] for of_one in figures]
    assert perplexities[0] != perplexities[1]
    assert abs(perplexities[1] / perplexities[0] - 1) < 0.03
    result = generate(packed[0], "import os\n", max_new_tokens=4, device="cpu")
    weight_bytes = [run["weight_bytes"] for run in result["runs"].values()]
    assert result["sparse_layers"] == 42 and weight_bytes[1] < weight_bytes[0]


def test_a_dense_fp8_checkpoint_is_loaded_as_what_it_stands_for(fp8_pruned: Path) -> None:
    loaded = load_model(fp8_pruned, CPU)
    tensors = load_file(fp8_pruned / "model.safetensors")
    assert loaded.scheme == SCHEME and len(loaded.scales) == 42
    for name, scale in loaded.scales.items():
        w = loaded.model.get_submodule(name).weight
        stored, stored_scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert stored.dtype == FP8 and torch.equal(scale, stored_scale.float()[:, 0])
        assert torch.equal(w, reference.dequantize_fp8(stored, scale, w.dtype))
    assert not hasattr(loaded.model.config, "quantization_config")
    plain = load_model(DEMO, CPU)
    assert plain.scheme is None and plain.scales == {}


def test_packing_a_dense_fp8_checkpoint_keeps_its_bits(fp8_pruned: Path, tmp_path: Path) -> None:
    result = pack(fp8_pruned, tmp_path / "packed")
    assert len(result["layers"]) == 42
    before = load_file(fp8_pruned / "model.safetensors")
    after = load_file(tmp_path / "packed" / "model.safetensors")
    for layer in result["layers"]:
        name = layer["name"]
        dense = ops.unpack_2to4(after[f"{name}.values"], after[f"{name}.codes"])
        assert torch.equal(bits(dense), bits(before[f"{name}.weight"]))
        assert torch.equal(
            after[f"{name}.weight_scale"], before[f"{name}.weight_scale"][:, 0].float()
        )
    assert inspect_model(tmp_path / "packed")["num_packed"] == 42
    assert inspect_model(fp8_pruned)["num_2to4"] == 42
    result = generate(fp8_pruned, "import os\n", max_new_tokens=2, compare=False, device="cpu")
    assert result["sparse_layers"] == 42


def test_what_is_not_2to4_is_written_in_the_models_dtype(pruned: Path, tmp_path: Path) -> None:
    directory = quantize_files(pruned, tmp_path / "fp8")
    tensors = load_file(directory / "model.safetensors")
    tensors[f"{UP}.weight"][0, :4] = torch.ones(4).to(FP8)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    result = pack(directory, tmp_path / "packed")
    assert len(result["layers"]) == 41 and "not 2:4" in result["left_dense"][UP]
    after = load_file(tmp_path / "packed" / "model.safetensors")
    scale = tensors[f"{UP}.weight_scale"][:, 0].float()
    dtype = after["model.embed_tokens.weight"].dtype
    expected = reference.dequantize_fp8(tensors[f"{UP}.weight"], scale, dtype)
    assert torch.equal(after[f"{UP}.weight"], expected) and f"{UP}.weight_scale" not in after
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto")


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (None, f"holds {UP}.weight in FP8 and no {UP}.weight_scale"),
        (torch.ones(3, 1), "has a positive scale for each of the"),
        (torch.zeros(1), "has a positive scale for each of the"),
    ],
)
def test_unsound_scales_are_refused(
    pruned: Path, tmp_path: Path, scale: Tensor | None, message: str
) -> None:
    directory = quantize_files(pruned, tmp_path / "fp8")
    tensors = load_file(directory / "model.safetensors")
    del tensors[f"{UP}.weight_scale"]
    if scale is not None:
        tensors[f"{UP}.weight_scale"] = scale
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProxsparseError, match=message):
        load_model(directory, CPU)


def changed(**parts: dict[str, Any]) -> dict[str, Any]:
    entry = json.loads(json.dumps(ENTRY))
    for part, values in parts.items():
        target = entry if part == "entry" else entry["config_groups"]["group_0"][part]
        target.update(values)
    return entry


@pytest.mark.parametrize(
    ("entry", "is_ours"),
    [
        (ENTRY, True),
        (changed(entry={"sparsity_config": {}}), True),
        (changed(entry={"sparsity_config": {"format": "dense"}}), True),
        (changed(entry={"sparsity_config": {"format": "sparse-24-bitmask"}}), False),
        (changed(entry={"quant_method": "fp8"}), False),
        (changed(entry={"format": "pack-quantized"}), False),
        (changed(entry={"config_groups": {}}), False),
        (changed(entry={"config_groups": None}), False),
        (changed(weights={"num_bits": 4}), False),
        (changed(weights={"type": "int"}), False),
        (changed(weights={"strategy": "tensor"}), False),
        (changed(input_activations={"dynamic": False}), False),
        (changed(input_activations={"strategy": "tensor"}), False),
        ({}, False),
        ([], False),
        ("compressed-tensors", False),
    ],
)
def test_which_entries_say_the_scheme(entry: Any, is_ours: bool) -> None:
    assert (find_entry({"quantization_config": entry}) is not None) == is_ours
    assert (find_entry({"compression_config": entry}) is not None) == is_ours


def test_refusals(pruned: Path, packed: Any, tmp_path: Path) -> None:
    with pytest.raises(ProxsparseError, match="--quantize is 'INT4': choose FP8_DYNAMIC"):
        pack(pruned, tmp_path / "out", quantize="INT4")
    with pytest.raises(ProxsparseError, match="is packed already"):
        pack(packed[0], tmp_path / "out", quantize=SCHEME)
    assert list(tmp_path.iterdir()) == []
