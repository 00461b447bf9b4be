"""LoRA of peft on packed models: trained, saved, loaded, merged, and under a Trainer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from proxsparse import (
    ProxsparseError,
    SparseLinear,
    densify_,
    mask_callback,
    masks_of,
    merge_and_pack,
    ops,
    sparsify_,
)
from proxsparse.models.targets import find_targets

peft = pytest.importorskip("peft")
ALL = {"target_modules": "all-linear", "r": 4}


@pytest.fixture
def packed(tiny_model: Callable[[str], Any]) -> Callable[[str], Any]:
    def make(name: str) -> Any:
        model = tiny_model(name)
        for target in find_targets(model).layers:
            target.set_weight_(ops.project_2to4(target.weight()))
        sparsify_(model)
        return model

    return make


X = torch.arange(3, 35).view(2, 16)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    model.eval()
    return model(input_ids=X, use_cache=False).logits


def train(model: Any, steps: int = 4) -> list[float]:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=0.02), []
    for _ in range(steps):
        loss = model(input_ids=X, labels=X).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def bits(model: Any) -> dict[str, Tensor]:
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): x.clone()
        for name, x in model.state_dict().items()
        if name.endswith((".values", ".codes"))
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "qwen2"])
def test_trains_saves_loads_and_merges(
    packed: Callable[[str], Any], tmp_path: Path, name: str, recwarn: Any
) -> None:
    model = packed(name)
    before, num_sparse = bits(model), len(bits(model)) // 2
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(**ALL))
    layers = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == num_sparse
    assert not [w for w in recwarn if "Unsupported layer" in str(w.message)]
    losses = train(adapted)
    assert losses[-1] < losses[0]
    after = bits(adapted)
    assert after.keys() == before.keys()
    assert all(torch.equal(x, before[key]) for key, x in after.items())

    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected)

    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), expected)
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), expected)
    assert all(torch.equal(x, before[key]) for key, x in bits(adapted).items())

    merged = loaded.merge_and_unload()
    assert not any(isinstance(m, SparseLinear) for m in merged.modules())
    torch.testing.assert_close(logits(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), expected)


def test_a_merge_that_keeps_the_masks(packed: Callable[[str], Any], tmp_path: Path) -> None:
    model = packed("llama")
    codes = {key: x for key, x in bits(model).items() if key.endswith("codes")}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**ALL))
    train(adapted)
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    delta, old = layer.get_delta_weight("default").detach(), layer.base_layer.weight.clone()
    mask = old != 0
    merged, report = merge_and_pack(adapted)
    assert set(report.dropped) == {name.removesuffix(".codes") for name in codes}
    share = (delta[~mask].square().sum() / delta.square().sum()).item()
    assert report.dropped["model.layers.0.mlp.up_proj"] == pytest.approx(share, rel=1e-5)
    assert "14 layers merged and packed" in repr(report) and 0.3 < report.mean_dropped < 0.7
    now = merged.model.layers[0].mlp.up_proj
    assert isinstance(now, SparseLinear)
    torch.testing.assert_close(now.weight, torch.where(mask, old + delta, 0.0))
    assert all(torch.equal(bits(merged)[key], x) for key, x in codes.items())
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged)
    )


def test_merges_that_cannot_be(packed: Callable[[str], Any], tiny_model: Any) -> None:
    dense = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**ALL))
    with pytest.raises(ProxsparseError, match="no LoRA adapter on a packed layer"):
        merge_and_pack(dense)
    model = peft.get_peft_model(packed("llama"), peft.LoraConfig(**ALL))
    model.merge_adapter()
    with pytest.raises(ProxsparseError, match="is merged already"):
        merge_and_pack(model)


def test_some_layers_only(packed: Callable[[str], Any], tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2)
    model = peft.get_peft_model(packed("llama"), config)
    train(model)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert len(merged.config.quantization_config.layers) == 12  # the other packed ones
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), expected)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, SparseLinear)


def test_variants_say_that_they_are_not_there(packed: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="variant"):
        peft.get_peft_model(packed("llama"), peft.LoraConfig(**ALL, use_dora=True))


@pytest.mark.parametrize("order", ["import peft, proxsparse", "import proxsparse, peft"])
def test_in_any_order_of_imports(packed: Callable[[str], Any], tmp_path: Path, order: str) -> None:
    packed("llama").save_pretrained(tmp_path)
    code = f"""{order}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
print(type(model.base_model.model.model.layers[0].mlp.up_proj).__name__)
"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "SparseLora", done.stderr


def trainer(model: Any, output: Path, callbacks: Sequence[Any] = (), **settings: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in X.repeat(4, 1)]
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.02,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        save_steps=2,
        disable_tqdm=True,
        **settings,
    )
    return Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))


def losses_of(found: Trainer) -> list[float]:
    return [entry["loss"] for entry in found.state.log_history if "loss" in entry]


def test_trainer_with_adapters_in_bfloat16_recomputing(
    packed: Callable[[str], Any], tmp_path: Path
) -> None:
    model = packed("llama").to(torch.bfloat16)
    before = bits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**ALL, task_type="CAUSAL_LM"))
    adapted.enable_input_require_grads()
    run = trainer(adapted, tmp_path, bf16=True, gradient_checkpointing=True)
    run.train()
    losses = losses_of(run)
    assert losses[-1] < losses[0]
    assert all(torch.equal(x, before[key]) for key, x in bits(adapted).items())
    assert (tmp_path / "checkpoint-4/adapter_model.safetensors").is_file()


def test_trainer_without_adapters_trains_what_is_not_packed(
    packed: Callable[[str], Any], tmp_path: Path
) -> None:
    model = packed("llama")
    before, norm = bits(model), model.model.norm.weight.clone()
    trainer(model, tmp_path).train()
    assert not torch.equal(model.model.norm.weight, norm)
    assert all(torch.equal(x, before[key]) for key, x in bits(model).items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    torch.testing.assert_close(logits(loaded), logits(model))


def test_trainer_keeps_masks(packed: Callable[[str], Any], tmp_path: Path) -> None:
    model = packed("llama")
    densify_(model)
    masks = masks_of(model)
    trainer(model, tmp_path, [mask_callback()]).train()
    for target in find_targets(model).layers:
        w = target.weight()
        assert not w[~masks[target.parameter_name]].any() and w.any()
    assert len(sparsify_(model).sparse) == 14


def test_a_save_without_its_masks_is_refused(packed: Callable[[str], Any], tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Spoil(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            model.model.layers[1].mlp.up_proj.weight.data += 0.5

    model = packed("llama")
    densify_(model)
    with pytest.raises(ProxsparseError, match=r"layers.1.mlp.up_proj has \d+ pruned weights"):
        trainer(model, tmp_path, [mask_callback(), Spoil()]).train()
