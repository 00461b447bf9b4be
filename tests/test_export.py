"""Dense FP8 checkpoints that this package writes: by export, and by pruning rounded weights."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import proxsparse
from proxsparse import Masks, ProxsparseError, ops
from proxsparse.jobs.export import export
from proxsparse.jobs.pack import pack
from proxsparse.jobs.prune import apply
from proxsparse.models.fp8 import find_entry
from proxsparse.ops import FP8, reference

DEMO = Path(proxsparse.__file__).parent / "demo_model"
SCHEME = "FP8_DYNAMIC"
UP = "model.layers.0.mlp.up_proj"
HAS_LIBRARY = all(importlib.util.find_spec(name) for name in ("compressed_tensors", "loguru"))
LEARN = {"calibration": "stdlib", "steps": 2, "batch_size": 2, "max_seq_length": 64}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


class _StandIn:
    """Writes the part of an entry that this package reads back; see compressed-tensors."""

    def __init__(self, config_groups: dict[str, Any], **fields: Any) -> None:
        self._entry = {"quant_method": "compressed-tensors", "config_groups": config_groups}
        self._entry |= fields

    def to_dict(self) -> dict[str, Any]:
        return self._entry


def _scheme(name: str, targets: list[str]) -> dict[str, Any]:
    assert name == SCHEME
    both = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = {**both, "strategy": "channel", "dynamic": False}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": {**both, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library where it is installed."""
    if HAS_LIBRARY:
        return
    module = ModuleType("compressed_tensors.quantization")
    module.QuantizationConfig, module.preset_name_to_scheme = _StandIn, _scheme  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "compressed_tensors", ModuleType("compressed_tensors"))
    monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", module)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: Any) -> Path:
    output: Path = tmp_path_factory.mktemp("pruned") / "model"
    proxsparse.prune(DEMO, output, method="magnitude", ignore=("down_proj",))
    return output


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def test_every_linear_layer_of_the_blocks_is_rounded(pruned: Path, tmp_path: Path) -> None:
    result = export(pruned, tmp_path / "fp8")
    assert (len(result["layers"]), result["num_2to4"]) == (42, 36)
    before = load_file(pruned / "model.safetensors")
    after = load_file(tmp_path / "fp8" / "model.safetensors")
    for name, w in before.items():
        if "proj" not in name:
            assert torch.equal(after[name], w)
            continue
        values, scale = ops.quantize_fp8(w)
        assert torch.equal(bits(after[name]), bits(values))
        assert torch.equal(after[f"{name}_scale"], scale.unsqueeze(-1))
        assert not (bits(after[name]) == 0x80).any()
    assert len(after) == len(before) + 42
    entry = config_of(tmp_path / "fp8")["quantization_config"]
    assert find_entry({"quantization_config": entry}) is not None
    assert entry["ignore"] == ["lm_head"] and "sparsity_config" not in entry
    assert result["checkpoint_bytes"][1] < 0.75 * result["checkpoint_bytes"][0]


def test_of_packed_models_too(pruned: Path, tmp_path: Path) -> None:
    export(pruned, tmp_path / "direct")
    expected = load_file(tmp_path / "direct" / "model.safetensors")
    for quantize in (None, SCHEME):
        pack(pruned, tmp_path / f"packed {quantize}", quantize=quantize)
        export(tmp_path / f"packed {quantize}", tmp_path / f"fp8 {quantize}")
        tensors = load_file(tmp_path / f"fp8 {quantize}" / "model.safetensors")
        assert set(tensors) == set(expected)
        for name, x in expected.items():
            assert tensors[name].dtype == x.dtype and tensors[name].shape == x.shape
            assert torch.equal(bits(tensors[name]), bits(x)), name


def test_ignored_layers_stay_and_are_named_in_the_config(pruned: Path, tmp_path: Path) -> None:
    result = export(pruned, tmp_path / "fp8", ignore=("down_proj", "q_proj"))
    assert len(result["layers"]) == 30
    ignored = config_of(tmp_path / "fp8")["quantization_config"]["ignore"]
    assert len(ignored) == 13 and "model.layers.3.mlp.down_proj" in ignored
    after = load_file(tmp_path / "fp8" / "model.safetensors")
    assert after["model.layers.0.mlp.down_proj.weight"].dtype != FP8


def test_export_then_pack_keeps_the_bits(pruned: Path, tmp_path: Path) -> None:
    export(pruned, tmp_path / "fp8")
    pack(tmp_path / "fp8", tmp_path / "there")
    pack(pruned, tmp_path / "direct", quantize=SCHEME)
    there, direct = (
        load_file(tmp_path / name / "model.safetensors") for name in ("there", "direct")
    )
    assert set(there) == set(direct)
    for name, x in direct.items():
        if "down_proj" not in name:  # not 2:4: rounded on the way, and not here
            assert torch.equal(bits(there[name]), bits(x)), name


@pytest.mark.skipif(not HAS_LIBRARY, reason="needs compressed-tensors")
def test_transformers_loads_it_as_plain_fp8(pruned: Path, tmp_path: Path) -> None:
    export(pruned, tmp_path / "fp8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype="auto")
    assert model.config.quantization_config.quant_method == "compressed-tensors"
    rounded = AutoModelForCausalLM.from_pretrained(pruned, dtype="auto")
    for name, module in rounded.named_modules():
        if name.endswith("proj"):
            w = module.weight.data
            module.weight.data = reference.dequantize_fp8(*ops.quantize_fp8(w), w.dtype)
    x = torch.arange(3, 40)[None]
    with torch.no_grad():
        difference = (model(x).logits.float() - rounded(x).logits.float()).norm()
        assert difference < 0.1 * rounded(x).logits.float().norm()


@pytest.mark.parametrize("method", ["magnitude", "gates"])
def test_pruning_rounded_weights_gives_a_mask_on_the_fp8_model(method: str, tmp_path: Path) -> None:
    settings = LEARN if method == "gates" else {}
    result = proxsparse.prune(DEMO, tmp_path / "out", method=method, quantize=SCHEME, **settings)
    assert result.report["recipe"]["quantize"] == SCHEME
    base, after = (load_file(d / "model.safetensors") for d in (DEMO, tmp_path / "out"))
    masks = Masks.load(tmp_path / "out")
    assert len(masks) == 42
    for name in masks:
        values, scale = ops.quantize_fp8(base[name])  # of the whole row, not of what is kept
        expected = torch.where(masks[name], bits(values), torch.zeros((), dtype=torch.uint8))
        assert torch.equal(bits(after[name]), expected)
        assert torch.equal(after[f"{name}_scale"], scale.unsqueeze(-1))
        if method == "magnitude":
            rounded = reference.dequantize_fp8(values, scale, base[name].dtype)
            assert torch.equal(masks[name], ops.mask_2to4(rounded))
    packed = pack(tmp_path / "out", tmp_path / "packed")
    assert len(packed["layers"]) == 42
    kept = load_file(tmp_path / "packed" / "model.safetensors")
    dense = ops.unpack_2to4(kept[f"{UP}.values"], kept[f"{UP}.codes"])
    assert torch.equal(bits(dense), bits(after[f"{UP}.weight"]))


def test_pruning_a_public_fp8_model_gives_a_mask_on_its_bits(tmp_path: Path) -> None:
    export(DEMO, tmp_path / "public")
    base = load_file(tmp_path / "public" / "model.safetensors")
    for name in list(base):  # scales that no row's largest weight would give
        if name.endswith("_scale"):
            base[name] = (base[name] * 1.37).bfloat16()
    save_file(base, tmp_path / "public" / "model.safetensors", metadata={"format": "pt"})
    proxsparse.prune(tmp_path / "public", tmp_path / "out", method="magnitude")
    after, masks = load_file(tmp_path / "out" / "model.safetensors"), Masks.load(tmp_path / "out")
    assert set(after) == set(base)
    for name, x in base.items():
        if name not in masks:
            assert torch.equal(after[name], x), name
            continue
        expected = torch.where(masks[name], bits(x), torch.zeros((), dtype=torch.uint8))
        assert torch.equal(bits(after[name]), expected)
    entries = [config_of(tmp_path / d)["quantization_config"] for d in ("public", "out")]
    assert entries[0] == entries[1]
    apply(tmp_path / "public", tmp_path / "out", tmp_path / "applied")
    applied = load_file(tmp_path / "applied" / "model.safetensors")
    assert all(torch.equal(bits(applied[name]), bits(x)) for name, x in after.items())


def test_refusals(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(pruned, tmp_path / "fp8")
    out = tmp_path / "out"
    with pytest.raises(ProxsparseError, match="--format is 'GGUF': choose FP8_DYNAMIC"):
        export(pruned, out, format="GGUF")
    with pytest.raises(ProxsparseError, match="is a dense checkpoint in FP8_DYNAMIC already"):
        export(tmp_path / "fp8", out)
    with pytest.raises(ProxsparseError, match="--quantize is 'INT8': choose FP8_DYNAMIC"):
        proxsparse.prune(DEMO, out, method="magnitude", quantize="INT8")
    with pytest.raises(ProxsparseError, match="sparsegpt changes the weights it keeps"):
        proxsparse.prune(DEMO, out, method="sparsegpt", quantize=SCHEME, calibration="stdlib")
    with pytest.raises(ProxsparseError, match="neither --random-init nor a GGUF file"):
        proxsparse.prune(DEMO, out, method="magnitude", quantize=SCHEME, random_init=True)
    with pytest.raises(ProxsparseError, match="would round the model in memory"):
        model = AutoModelForCausalLM.from_pretrained(DEMO)
        proxsparse.learn_masks(model, method="magnitude", quantize=SCHEME)
    with pytest.raises(ProxsparseError, match="and lm_head of it is not: leave it out"):
        untied = tmp_path / "untied"
        export(pruned, untied)
        tensors = load_file(untied / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
        config = config_of(untied) | {"tie_word_embeddings": False}
        (untied / "config.json").write_text(json.dumps(config))
        proxsparse.prune(untied, out, method="magnitude", targets=("lm_head", "up_proj"))
    monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", None)
    for job in (
        lambda: export(pruned, out),
        lambda: proxsparse.prune(DEMO, out, method="magnitude", quantize=SCHEME),
    ):
        with pytest.raises(ProxsparseError, match=r"pip install 'proxsparse\[fp8\]'"):
            job()
    assert not out.exists() and not (tmp_path / "out.partial").exists()


def test_layers_of_other_kinds_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    for name, kind in (("gpt2", "a Conv1D, stored transposed"), ("mixtral", "a tensor of experts")):
        model = tiny_model(name)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        model.save_pretrained(tmp_path / name)
        source = tmp_path / name
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (source / file).write_bytes((DEMO / file).read_bytes())
        with pytest.raises(ProxsparseError, match=f"is {kind}.*pack --quantize"):
            export(source, tmp_path / "out")


def test_recovery_refuses_a_base_in_fp8(pruned: Path, tmp_path: Path) -> None:
    export(DEMO, tmp_path / "base")
    with pytest.raises(ProxsparseError, match="and recover changes the weights it keeps"):
        proxsparse.recover(pruned, tmp_path / "base", tmp_path / "out", **LEARN)
    with pytest.raises(ProxsparseError, match="quantize is not used by recover"):
        proxsparse.recover(pruned, DEMO, tmp_path / "out", quantize=SCHEME, **LEARN)


def test_the_commands(pruned: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from proxsparse.cli import app

    runner = CliRunner()
    for arguments, shown in (
        (["export", str(pruned), "-o", str(tmp_path / "fp8")], "42 layers in FP8_DYNAMIC, 36 of"),
        (["pack", str(tmp_path / "fp8"), "-o", str(tmp_path / "packed")], "36 layers packed"),
        (
            ["pack", str(pruned), "--quantize", SCHEME, "-o", str(tmp_path / "direct")],
            "36 layers packed",
        ),
        (["inspect", str(tmp_path / "packed")], "36 of 42 layers are 2:4, 36 of them packed"),
    ):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert shown in " ".join(result.output.split())
    for arguments, message in (
        (["pack", str(pruned), "--quantize", "INT8"], "--quantize is 'INT8': choose FP8_DYNAMIC"),
        (["export", str(pruned), "--format", "AWQ"], "--format is 'AWQ': choose FP8_DYNAMIC"),
        (["prune", str(DEMO), "--quantize", "FP4"], "--quantize is 'FP4': choose FP8_DYNAMIC"),
    ):
        result = runner.invoke(app, [*arguments, "-o", str(tmp_path / "out")])
        assert result.exit_code == 1 and message in " ".join(result.output.split())
