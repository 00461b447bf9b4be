"""GGUF files as input: what comes out is a pruned checkpoint of the dense model they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import proxsparse
from proxsparse import ProxsparseError, prune
from proxsparse.models.loading import load_model

gguf = pytest.importorskip("gguf")
DEMO = Path(proxsparse.__file__).parent / "demo_model"
HIDDEN, INNER, HEADS, VOCABULARY = 64, 128, 4, 4096


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A Llama of one block with 8-bit matrices and the demo's tokenizer."""
    path = tmp_path / "base" / "tiny.gguf"
    path.parent.mkdir()
    write_llama(path)
    return path


def write_llama(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())["model"]
    vocabulary = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * VOCABULARY)
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["merges"]]
    writer.add_token_merges(merges)
    generator = torch.Generator().manual_seed(0)

    def add(name: str, *shape: int) -> None:
        values = (torch.randn(shape, generator=generator) * 0.05).numpy()
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", VOCABULARY, HIDDEN)
    add("output.weight", VOCABULARY, HIDDEN)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.0.{name}.weight", HIDDEN, HIDDEN)
    add("blk.0.ffn_gate.weight", INNER, HIDDEN)
    add("blk.0.ffn_up.weight", INNER, HIDDEN)
    add("blk.0.ffn_down.weight", HIDDEN, INNER)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(HIDDEN).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_gguf_file_is_pruned_as_what_it_stands_for(
    file: Path, tmp_path: Path, as_folder: bool
) -> None:
    from transformers import AutoModelForCausalLM

    source = file.parent if as_folder else file
    result = prune(source, tmp_path / "out", method="magnitude")
    assert result.report["base"]["dequantised_from"] == "Q8_0"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    dense = load_model(file, torch.device("cpu")).model
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    expected = dict(dense.named_parameters())
    assert len(result.report["layers"]) == 7
    pruned_names = {f"{layer['name']}.weight" for layer in result.report["layers"]}
    for name, x in pruned.named_parameters():
        kept = x != 0 if name in pruned_names else torch.ones_like(x, dtype=torch.bool)
        assert torch.equal(x[kept], expected[name][kept])
        if name in pruned_names:
            assert not kept.view(-1, 4).sum(-1).gt(2).any()


def test_a_mask_learned_on_a_gguf_file_can_be_applied_to_it(file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from proxsparse.jobs.prune import apply

    settings: dict[str, Any] = {"steps": 2, "batch_size": 1, "max_seq_length": 32}
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    prune(file, tmp_path / "out", calibration=tmp_path / "text.txt", **settings)
    apply(file, tmp_path / "out", tmp_path / "again")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_several_files_are_a_question(file: Path, tmp_path: Path) -> None:
    (file.parent / "other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(ProxsparseError, match=r"several GGUF files \(other\.gguf, tiny\.gguf\)"):
        prune(file.parent, tmp_path / "out", method="magnitude")


@pytest.mark.parametrize("damage", ["cut short", "another kind", "of no known architecture"])
def test_a_damaged_file_is_named(file: Path, tmp_path: Path, damage: str) -> None:
    data = file.read_bytes()
    if damage == "cut short":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "another kind":
        file.write_bytes(b"GGML" + data[4:])
    else:
        file.write_bytes(data.replace(b"llama", b"lllll"))
    with pytest.raises(ProxsparseError, match=r"tiny\.gguf"):
        prune(file, tmp_path / "out", method="magnitude")
    assert not list(tmp_path.glob("out*"))


def test_without_the_package_the_way_out_is_said(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ProxsparseError, match="pip install gguf"):
        prune(file, tmp_path / "out", method="magnitude")
