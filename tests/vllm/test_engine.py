"""Packed models inside vLLM's engine: its greedy tokens are those of transformers.

All engines run in this process, one after the other, because importing vLLM takes longer than
starting one of them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from proxsparse import ProxsparseError, ops

pytest.importorskip("vllm", reason="vLLM is not installed here: see `make test-vllm`")
if torch.cuda.is_available():
    pytest.skip("tokens are compared in float32, on a CPU", allow_module_level=True)

Model = Callable[..., Path]
Expected = Callable[[Path], list[list[int]]]


@contextlib.contextmanager
def serving(path: Path, **settings: Any) -> Iterator[Any]:
    """A vLLM engine in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 8,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
    }
    llm = None
    try:
        llm = LLM(str(path), **(defaults | settings))
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def tokens_of(llm: Any, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    """What the engine generates greedily."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    results = llm.generate(inputs, how, use_tqdm=False, **settings)
    return [list(result.outputs[0].token_ids) for result in results]


def linear_layers(llm: Any) -> dict[str, Any]:
    """Name -> linear layer of the model inside an engine."""
    from vllm.model_executor.layers.linear import LinearBase

    (layers,) = llm.apply_model(
        lambda model: {n: m for n, m in model.named_modules() if isinstance(m, LinearBase)}
    )
    return layers


def summary(messages: list[str]) -> str:
    """The one line that says what became of the layers."""
    (line,) = [message for message in messages if "run sparse" in message]
    return line


def write_adapter(path: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Write a LoRA adapter as PEFT does; returns module name -> what it adds to its weight."""
    from safetensors.torch import save_file

    rank, tensors, deltas = 8, {}, {}
    generator = torch.Generator().manual_seed(1)
    for name, (n, k) in shapes.items():
        a = torch.randn(rank, k, generator=generator) * 0.1
        b = torch.randn(n, rank, generator=generator) * 0.1
        stem = f"base_model.model.{name}"
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        deltas[name] = b @ a
    path.mkdir()
    save_file(tensors, str(path / "adapter_model.safetensors"))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def test_a_packed_model_and_an_adapter_on_it(
    model: Model,
    expected: Expected,
    greedy: Callable[[Any], list[list[int]]],
    prompts: list[list[int]],
    messages: list[str],
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM
    from vllm.lora.request import LoRARequest

    path = model("llama", "packed")
    merged = AutoModelForCausalLM.from_pretrained(model("llama", "pruned"), dtype=torch.float32)
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in parts]
    shapes = {name: tuple(merged.get_submodule(name).weight.shape) for name in names}
    for name, delta in write_adapter(tmp_path / "adapter", shapes).items():
        merged.get_submodule(name).weight.data += delta
    adapted = greedy(merged)
    assert adapted != expected(path)

    with serving(path, enable_lora=True, max_lora_rank=8) as llm:
        assert tokens_of(llm, prompts) == expected(path)
        request = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
        assert tokens_of(llm, prompts, lora_request=request) == adapted
        layers = linear_layers(llm)
    assert len(layers) == 8
    for layer in layers.values():
        assert type(layer.quant_method).__name__ == "PackedLinearMethod"
        assert [name for name, _ in layer.named_parameters()] == ["weight"], "one tensor a layer"
        assert not list(layer.buffers())
    assert "8 of 8 linear layers run sparse" in summary(messages)


def test_parts_of_merged_layers_stay_dense_and_weights_are_reloaded(
    model: Model, expected: Expected, prompts: list[list[int]], messages: list[str]
) -> None:
    """Qwen2 has biases on q, k and v, of which k is dense here."""
    path, other = model("qwen2", "mixed"), model("qwen2", "mixed", 1)
    with serving(path) as llm:
        assert tokens_of(llm, prompts) == expected(path)
        layers = linear_layers(llm)
        before = {name: layer.weight.data_ptr() for name, layer in layers.items()}
        assert expected(other) != expected(path)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        assert tokens_of(llm, prompts) == expected(other)
        after = {name: layer.weight.data_ptr() for name, layer in layers.items()}
        qkv = layers["model.layers.0.self_attn.qkv_proj"]
        assert qkv.quant_method.layout.is_sparse == (True, False, True)
        w = qkv.quant_method.dequantize_weight(qkv)
        assert bool(ops.is_2to4(w[:128])) and not bool(ops.is_2to4(w[128:192]))
        sparse = {n for n, layer in layers.items() if "Packed" in type(layer.quant_method).__name__}
        # A graph that was captured before reads the weights where they were.
        assert {n: after[n] for n in sparse} == {n: before[n] for n in sparse}
    assert "6 of 8 linear layers run sparse" in summary(messages)
    assert "not packed: model.layers.1.mlp.gate_up_proj, model.layers.1.mlp.down_proj" in summary(
        messages
    )


def test_a_dense_checkpoint_is_packed_on_loading_whatever_its_config_holds(
    model: Model,
    expected: Expected,
    prompts: list[list[int]],
    messages: list[str],
    tmp_path: Path,
) -> None:
    """Public 2:4 models are stored so, with an entry of compressed-tensors."""
    path = shutil.copytree(model("qwen2", "part"), tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "sparsity_config": {"format": "dense", "sparsity_structure": "2:4", "ignore": ["lm_head"]},
    }
    (path / "config.json").write_text(json.dumps(config))
    with serving(path, quantization="proxsparse") as llm:
        assert tokens_of(llm, prompts) == expected(model("qwen2", "part"))
        other = model("qwen2", "part", 1)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        assert tokens_of(llm, prompts) == expected(other)
        with pytest.raises(ProxsparseError, match="not 2:4 where those before were"):
            dense = model("qwen2", "dense")
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(dense)})
    assert "6 of 8 linear layers run sparse" in summary(messages)
    assert "not 2:4: model.layers.1.mlp.gate_up_proj, model.layers.1.mlp.down_proj" in summary(
        messages
    )


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("phi3", "8 of 8 linear layers run sparse"),  # merged on disk already
        ("mixtral", "experts, which have no sparse kernel: model.layers.0.block_sparse_moe"),
    ],
)
def test_other_architectures(
    kind: str,
    text: str,
    model: Model,
    expected: Expected,
    prompts: list[list[int]],
    messages: list[str],
) -> None:
    path = model(kind, "packed")
    with serving(path) as llm:
        assert tokens_of(llm, prompts) == expected(path)
    assert text in summary(messages)


def test_dummy_weights_run(model: Model, prompts: list[list[int]], tmp_path: Path) -> None:
    """What speed is measured with: a config that names packed layers, and no weights."""
    shutil.copy(model("llama", "packed") / "config.json", tmp_path)
    with serving(tmp_path, load_format="dummy", dtype="bfloat16") as llm:
        assert all(len(row) == 24 for row in tokens_of(llm, prompts))


def test_it_compiles_into_one_graph(
    model: Model, expected: Expected, prompts: list[list[int]], tmp_path: Path
) -> None:
    """vLLM asks torch.compile for the full graph: a break would be an error."""
    path = model("qwen2", "mixed")
    with serving(path, enforce_eager=False) as llm:
        assert tokens_of(llm, prompts) == expected(path)


def refused(path: Path, config: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the model with another quantization_config."""
    copy = Path(shutil.copytree(path, tmp_path / "refused"))
    whole = json.loads((copy / "config.json").read_text())
    whole["quantization_config"] = whole.get("quantization_config", {}) | config
    (copy / "config.json").write_text(json.dumps(whole))
    return copy


def layers_of(path: Path) -> list[str]:
    entry = json.loads((path / "config.json").read_text())["quantization_config"]
    return list(entry["layers"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["lm_head"], "lm_head is packed, but in vLLM it is a ParallelLMHead.*--ignore 'lm_head'"),
        (["model.layers.9.mlp.up_proj"], r"layers\.9\.mlp\.up_proj is packed.*unpack"),
    ],
)
def test_names_that_are_no_layers_are_refused(
    more: list[str], message: str, model: Model, tmp_path: Path
) -> None:
    path = model("llama", "packed")
    wrong = refused(path, {"layers": [*layers_of(path), *more]}, tmp_path)
    with pytest.raises(ProxsparseError, match=message), serving(wrong):
        pass


def test_names_of_another_model_are_refused(model: Model, tmp_path: Path) -> None:
    path = model("llama", "packed")
    names = [name.replace("model.", "decoder.") for name in layers_of(path)]
    with pytest.raises(ProxsparseError, match=r"decoder\.layers\.0.* and 8 more are packed"):
        with serving(refused(path, {"layers": names}, tmp_path)):
            pass


def test_a_name_with_a_dense_weight_is_refused(model: Model, tmp_path: Path) -> None:
    entry = {"quant_method": "proxsparse", "layers": layers_of(model("llama", "packed"))}
    wrong = refused(model("llama", "pruned"), entry, tmp_path)
    with pytest.raises(ProxsparseError, match=r"has a dense weight for model\.layers\.0"):
        with serving(wrong):
            pass


def test_a_newer_format_is_refused(model: Model, tmp_path: Path) -> None:
    wrong = refused(model("llama", "packed"), {"format_version": 99}, tmp_path)
    with pytest.raises(ValueError, match="packed in format 99"), serving(wrong):
        pass


def test_a_dense_model_that_is_not_2to4_is_refused(model: Model) -> None:
    with pytest.raises(ProxsparseError, match="no linear layer of the model is 2:4"):
        with serving(model("llama", "dense"), quantization="proxsparse"):
            pass
