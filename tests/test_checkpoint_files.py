"""A checkpoint comes out whole: nothing smaller, nothing as something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import proxsparse
from proxsparse import Masks, ProxsparseError
from proxsparse.jobs.inspect import inspect_model
from proxsparse.jobs.pack import pack, unpack
from proxsparse.jobs.prune import apply

DEMO = Path(proxsparse.__file__).parent / "demo_model"
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
}


def save(model: Any, directory: Path, **settings: Any) -> Path:
    model.save_pretrained(directory, **settings)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, directory / name)
    return directory


@pytest.fixture
def llama(tiny_model: Any, tmp_path: Path) -> Path:
    return save(tiny_model("llama"), tmp_path / "base")


def prune(base: Path, out: Path) -> Path:
    proxsparse.prune(base, out, method="magnitude")
    return out


def change_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def whisper() -> Any:
    config = transformers.WhisperConfig(
        **{"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48},
        **{"decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 16},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    )
    return transformers.WhisperForConditionalGeneration(config)


def bart() -> Any:
    config = transformers.BartConfig(
        **{"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
        **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    )
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize("make", [whisper, bart])
def test_encoder_decoders_are_refused_by_name(make: Any, tmp_path: Path) -> None:
    model = make()
    save(model, tmp_path / "base")
    with pytest.raises(ProxsparseError, match=f"an encoder-decoder .{type(model).__name__}"):
        prune(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)), "BertForMaskedLM"),
        (
            lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SMALL)),
            "BertLMHeadModel sees later tokens",
        ),
        (
            lambda: transformers.GemmaForSequenceClassification(
                transformers.GemmaConfig(**SMALL, head_dim=8, num_key_value_heads=2)
            ),
            "is a GemmaForSequenceClassification, which generates no text",
        ),
    ],
)
def test_other_classes_are_refused_by_name(make: Any, message: str, tmp_path: Path) -> None:
    save(make(), tmp_path / "base")
    with pytest.raises(ProxsparseError, match=message):
        prune(tmp_path / "base", tmp_path / "out")


def test_a_bert_that_is_a_decoder_is_one(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SMALL, is_decoder=True)
    prune(save(transformers.BertLMHeadModel(config), tmp_path / "base"), tmp_path / "out")


def test_files_of_an_adapter_are_refused(llama: Path, tmp_path: Path) -> None:
    (llama / "adapter_config.json").write_text("{}")
    with pytest.raises(ProxsparseError, match="merge it first"):
        prune(llama, tmp_path / "out")


@pytest.mark.parametrize("job", ["prune", "apply", "pack", "unpack"])
def test_every_job_carries_over_what_it_does_not_know(
    job: str, llama: Path, tmp_path: Path
) -> None:
    """Extra tensors, wider dtypes, side files, the class: through each job, one after another."""
    file = llama / "model.safetensors"
    tensors = load_file(file)
    tensors |= {
        "mtp.fc.weight": torch.randn(3, 8),
        "model.layers.2.mlp.up_proj.weight": torch.ones(4),
    }
    tensors["vision.scale"] = torch.tensor(2.0, dtype=torch.float64)
    save_file(tensors, file, metadata={"format": "pt"})
    (llama / "preprocessor_config.json").write_text("{}")
    change_config(llama, dtype="bfloat16", auto_map={"AutoConfig": "mine.Config"})
    (llama / "mine.py").write_text("")
    out = prune(llama, tmp_path / "prune")
    if job == "apply":
        out = tmp_path / "apply"
        apply(llama, tmp_path / "prune", out)  # the directory stands for its mask file
    elif job != "prune":
        pack(out, tmp_path / "pack")
        out = tmp_path / "pack"
        if job == "unpack":
            unpack(out, tmp_path / "unpack")
            out = tmp_path / "unpack"
    after = load_file(out / "model.safetensors")
    masks = Masks.load(out)
    for name, x in tensors.items():
        y = after[name]
        if job == "pack" and name in masks:
            owner = name.removesuffix("weight")
            y = proxsparse.ops.unpack_2to4(after[f"{owner}values"], after[f"{owner}codes"])
        expected = torch.where(masks[name], x, 0.0) if name in masks else x
        assert y.dtype == x.dtype and torch.equal(y, expected), name
    assert (out / "preprocessor_config.json").is_file() and (out / "mine.py").is_file()
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["auto_map"]
    assert ("quantization_config" in config) == (job == "pack")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(index) == sorted(after)
    assert [p.name for p in out.glob("*.safetensors")] == ["model.safetensors"]


def test_digits_beyond_the_models_dtype_stay_even_if_it_rounds_them_to_zero(
    llama: Path, tmp_path: Path
) -> None:
    file = llama / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][0, :4] = torch.tensor([1e-12, -1e-12, -0.0, 0.5])  # float16 has none of the first
    save_file(tensors, file, metadata={"format": "pt"})
    change_config(llama, dtype="float16")
    mask = Masks.load(prune(llama, tmp_path / "out"))[name]
    after = load_file(tmp_path / "out/model.safetensors")[name]
    assert torch.equal(after[mask], tensors[name][mask])
    assert not after[~mask].any() and not after[~mask].signbit().any()


def test_updated_weights_keep_what_they_did_not_change(llama: Path, tmp_path: Path) -> None:
    change_config(llama, dtype="bfloat16")
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text())
    settings: dict[str, Any] = {"max_seq_length": 16, "num_calibration_samples": 4}
    change_config(llama, vocab_size=96)
    tokens = [torch.randint(3, 90, (4, 16)) for _ in range(8)]
    proxsparse.prune(llama, tmp_path / "out", method="sparsegpt", calibration=tokens, **settings)
    before, after = (load_file(d / "model.safetensors") for d in (llama, tmp_path / "out"))
    masks = Masks.load(tmp_path / "out")
    for name, x in before.items():
        assert after[name].dtype == x.dtype
        if name in masks:
            assert not after[name][~masks[name]].any() and not torch.equal(after[name], x)
        else:
            assert torch.equal(after[name], x), name


def test_sharded_checkpoints_keep_their_files(tiny_model: Any, tmp_path: Path) -> None:
    base = save(tiny_model("qwen3_moe"), tmp_path / "base", max_shard_size="20KB")
    out = prune(base, tmp_path / "out")
    files = sorted(p.name for p in base.glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(p.name for p in out.glob("*.safetensors"))
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"] == index
    assert inspect_model(out)["mask_file"] == "matches"


def test_names_of_the_bare_model_stay(tiny_model: Any, tmp_path: Path) -> None:
    """GPT-2 on the Hub is stored without the prefix of the class that has a head."""
    base = save(tiny_model("gpt2").transformer, tmp_path / "base")
    assert "h.0.attn.c_attn.weight" in load_file(base / "model.safetensors")
    out = prune(base, tmp_path / "out")
    names = [list(load_file(d / "model.safetensors")) for d in (base, out)]
    assert names[0] == names[1]
    assert inspect_model(out)["num_2to4"] == inspect_model(out)["num_layers"] == 8
    pack(out, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    file = "model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (out / file).read_bytes()


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_stale_quantisation_is_not_copied(key: str, llama: Path, tmp_path: Path) -> None:
    change_config(llama, **{key: {"quant_method": "of_old", "bits": 3}})
    config = json.loads((prune(llama, tmp_path / "out") / "config.json").read_text())
    assert key not in config and config["model_type"] == "llama"


def test_masks_of_older_versions_are_read_everywhere(llama: Path, tmp_path: Path) -> None:
    old = prune(llama, tmp_path / "old")
    (old / "proxsparse.masks").rename(old / "masks.safetensors")
    assert inspect_model(old)["mask_file"] == "matches"
    for mask in (old, old / "masks.safetensors"):
        apply(llama, mask, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
    pack(old, tmp_path / "packed")
    assert (tmp_path / "packed/proxsparse.masks").is_file()
    assert not (tmp_path / "packed/masks.safetensors").exists()


def test_a_report_of_an_earlier_job_is_not_taken_along(llama: Path, tmp_path: Path) -> None:
    first = prune(llama, tmp_path / "first")
    (first / "training.png").write_text("a plot")
    second = prune(first, tmp_path / "second")
    assert not (second / "training.png").exists()
    base = json.loads((second / "proxsparse.json").read_text())["base"]["id"]
    assert base == str(first)


def test_an_output_inside_the_input_does_not_copy_itself(llama: Path) -> None:
    out = prune(llama, llama / "pruned")
    assert not (out / "pruned.partial").exists() and not (out / "pruned").exists()


def test_weights_without_a_counterpart_are_refused_before_the_work(
    tiny_model: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    base = save(tiny_model("llama"), tmp_path / "base")
    from proxsparse.models import checkpoint_files

    monkeypatch.setattr(
        checkpoint_files, "_revert", lambda _, t: {f"q.{k}": v for k, v in t.items()}
    )
    with pytest.raises(ProxsparseError, match=r"holds no q\.model.*write it with save_pretrained"):
        prune(base, tmp_path / "out")


def test_an_index_that_names_nothing_is_refused(llama: Path, tmp_path: Path) -> None:
    from proxsparse.models.checkpoint_files import open_checkpoint

    (llama / "model.safetensors").unlink()
    for text in ("{", "{}", '{"weight_map": {"a": "nowhere.safetensors"}}', "[]"):
        (llama / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ProxsparseError, match="cannot be read"):
            open_checkpoint(str(llama))


@pytest.mark.parametrize("kind", ["above", "absolute", "through"])
def test_nothing_is_written_where_an_index_leads_outside(
    kind: str, llama: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "other.safetensors"
    (llama / "model.safetensors").rename(outside)
    (llama / "inside").mkdir()
    name = {
        "above": "../other.safetensors",
        "absolute": str(outside),
        "through": "inside/../../other.safetensors",
    }[kind]
    weight_map = dict.fromkeys(load_file(outside), name)
    (llama / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    before = outside.read_bytes()
    with pytest.raises(ProxsparseError, match="which lies outside it"):
        prune(llama, tmp_path / "out")
    assert outside.read_bytes() == before and not (tmp_path / "out").exists()
