"""What came out, tensor by tensor, is what went in but for the pruned weights.

Random tiny models of many architectures go through prune, pack and unpack. Each checkpoint has what
real ones have and a model class has no place for: tensors of a head that predicts further tokens, a
weight with more digits than config.json says, a processor, code, a licence.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import proxsparse
from proxsparse import ProxsparseError
from proxsparse.jobs.pack import pack, unpack
from proxsparse.models.masks import Masks, masks_of
from proxsparse.models.targets import find_targets

DEMO = Path(proxsparse.__file__).parent / "demo_model"
EXTRA = "mtp.fc.weight"
SIDE_FILES = {
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "tokenizer.model": "pieces",
    "LICENSE": "terms",
    "modeling_custom.py": "answer = 42",
}
STALE = ("pytorch_model.bin", "original/params.json", "model-q4.gguf", "consolidated.safetensors")
# Whatever of these a config has is set, also in the configs that it holds.
TINY: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 96),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "sliding_window"), 64),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rotary_dim": 8},
}
# Of each kind: dense, fused, transposed, mixtures of experts, MLA, recurrent, hybrid, renamed.
DEFAULT = (
    *("llama", "gpt2", "phi3", "mixtral", "gpt_oss", "deepseek_v3", "mamba", "jamba", "falcon_h1"),
    *("gemma2", "bloom", "opt", "qwen3_next", "ernie4_5_moe"),
)
MORE = (
    *("afmoe", "arcee", "aria_text", "axk1", "bailing_hybrid", "bart", "biogpt", "codegen"),
    *("cohere", "cohere2_moe", "ctrl", "cwm", "deepseek_v2", "deepseek_v4", "diffllama", "doge"),
    *("dots1", "exaone4", "exaone_moe", "falcon_mamba", "flex_olmo", "gemma", "gemma3_text"),
    *("glm", "glm4_moe", "glm_moe_dsa", "gpt_bigcode", "gpt_neox", "gptj", "granitemoe"),
    *("helium", "hunyuan_v1_moe", "jetmoe", "kimi_linear", "lfm2", "llama4_text"),
    *("longcat_flash", "mamba2", "minicpm3", "minimax", "mistral", "moshi", "mpt", "nanochat"),
    *("nemotron", "nemotron_h", "olmo2", "olmoe", "openai-gpt", "persimmon", "phi", "phimoe"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_moe", "recurrent_gemma", "rwkv"),
    *("seed_oss", "smollm3", "stablelm", "starcoder2", "trocr", "vaultgemma", "xglm", "xlm"),
)
SHARED = {"layer_types": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 16}
VISION |= {"num_attention_heads": 2, "patch_size": 4}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zamba2": SHARED,
    "gemma3": {"vision_config": VISION, "mm_tokens_per_image": 4},
}


def tiny_config(kind: str, **changes: Any) -> Any:
    changes = {**CHANGES.get(kind, {}), **changes}
    config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[kind]
    default = config_class()
    settings = {k: v for k, v in TINY.items() if hasattr(default, k)}
    if "layer_types" in default.to_dict():
        settings["layer_types"] = (getattr(default, "layer_types", None) or [None])[:2]
    if "text_config" in config_class.sub_configs:
        text = config_class.sub_configs["text_config"].model_type
        settings["text_config"] = tiny_config(text).to_dict()
    return config_class(**{**settings, **changes})


def write_base(directory: Path, config: Any) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors[EXTRA] = torch.randn(4, 8)
    wide = next(k for k, v in tensors.items() if v.dim() == 2)
    tensors[wide] = tensors[wide].float() + 1e-5
    save_file(tensors, file, metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, directory / name)
    for name in (*SIDE_FILES, *STALE):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(SIDE_FILES.get(name, "old"))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def round_trip(tmp: Path, config: Any) -> None:
    base, out = tmp / "base", tmp / "out"
    write_base(base, config)
    masks = proxsparse.prune(base, out, method="magnitude").masks
    before, after = (load_file(d / "model.safetensors") for d in (base, out))
    assert list(before) == list(after) and EXTRA in after
    num_pruned = 0
    for name, x in before.items():
        y = after[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        changed = (bits(x) != bits(y)).reshape(*x.shape, -1).any(-1)
        assert not y[changed].any() and not y[changed].signbit().any(), name
        num_pruned += int(changed.sum())
    # Zeros of the base (a padding row, a fresh bias) are no changes, but in no target at random.
    assert num_pruned == sum(int((~masks[name]).sum()) for name in masks)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    dense = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto").state_dict()
    seen = masks_of(loaded)
    assert {k: v.tolist() for k, v in seen.codes.items()} == {
        k: v.tolist() for k, v in masks.codes.items()
    }
    pruned = {t.parameter.data_ptr() for t in find_targets(loaded).layers}
    for name, x in loaded.state_dict().items():
        if x.data_ptr() not in pruned:  # under any of its names
            assert torch.equal(bits(x), bits(dense[name])), name
    check_directory(base, out)
    linear = [n for n in masks if n.endswith(".weight") and len(masks.shapes[n]) == 2]
    if linear:
        pack(out, tmp / "packed")
        unpack(tmp / "packed", tmp / "again")
        for path in (p for p in out.rglob("*") if p.is_file()):
            again = tmp / "again" / path.relative_to(out)
            if path.suffix == ".safetensors":
                assert path.read_bytes() == again.read_bytes()
            assert again.is_file()
        assert EXTRA in load_file(tmp / "packed/model.safetensors")


def check_directory(base: Path, out: Path) -> None:
    for name, text in SIDE_FILES.items():
        assert (out / name).read_text() == text
    assert not [name for name in STALE if (out / name).exists()]
    assert [p.name for p in out.glob("*.safetensors")] == ["model.safetensors"]
    assert Masks.load(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(load_file(out / "model.safetensors"))
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("kind", DEFAULT)
def test_a_round_trip_changes_pruned_weights_only(kind: str, tmp_path: Path) -> None:
    round_trip(tmp_path, tiny_config(kind))


@pytest.mark.parametrize("kind", ["zamba2", "gemma3", "bamba"])
def test_shared_blocks_towers_and_hybrids(kind: str, tmp_path: Path) -> None:
    round_trip(tmp_path, tiny_config(kind))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
def test_tied_embeddings(kind: str, tmp_path: Path) -> None:
    round_trip(tmp_path, tiny_config(kind, tie_word_embeddings=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", MORE)
def test_many_more_architectures(kind: str, tmp_path: Path) -> None:
    round_trip(tmp_path, tiny_config(kind))


def test_what_the_files_hold_in_another_form_is_not_packed(tmp_path: Path) -> None:
    """Its files join four projections in one tensor: pruned they are, packed they cannot be."""
    with pytest.raises(ProxsparseError, match="joined with other weights, in pieces or permuted"):
        round_trip(tmp_path, tiny_config("hrm_text"))
    assert (tmp_path / "out").is_dir() and not (tmp_path / "packed").exists()


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_models_that_see_the_future_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ProxsparseError, match="sees later tokens"):
        round_trip(tmp_path, tiny_config(kind))
