"""Models that are not as they were loaded: adapted, wrapped, offloaded, prepared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload

from proxsparse import (
    ProxsparseError,
    SparseLinear,
    apply_masks_,
    keep_masks_,
    learn_masks,
    masks_of,
    ops,
    sparsify_,
)
from proxsparse.models.targets import find_targets


@pytest.fixture
def pruned(tiny_model: Any) -> Callable[[], Any]:
    def make() -> Any:
        model = tiny_model("llama")
        for target in find_targets(model).layers:
            target.set_weight_(ops.project_2to4(target.weight()))
        return model

    return make


def tokens() -> list[torch.Tensor]:
    return [torch.randint(3, 90, (4, 16)) for _ in range(40)]


def jobs(masks: Any) -> dict[str, Callable[[Any], Any]]:
    def keep(model: Any, masks: Any = None) -> Any:
        return keep_masks_(model, torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1), masks)

    return {
        "learn_masks": lambda m: learn_masks(m, tokens(), method="wanda", max_seq_length=16),
        "apply_masks_": lambda m: apply_masks_(m, masks),
        "masks_of": masks_of,
        "keep_masks_": keep,
        "keep_masks_ with masks": lambda m: keep(m, masks),
        "sparsify_": sparsify_,
    }


def adapted(model: Any, way: str) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    if way == "add_adapter":
        model.add_adapter(config)
        return model
    if way == "ia3":
        config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    wrapped = peft.get_peft_model(model, config)
    return wrapped.base_model.model if way == "the model in it" else wrapped


@pytest.mark.parametrize("way", ["get_peft_model", "the model in it", "add_adapter", "ia3"])
def test_adapted_models_are_refused_with_the_way_out(pruned: Any, way: str) -> None:
    model = pruned()
    masks = masks_of(model)
    wrapped = adapted(model, way)
    before = {k: v.clone() for k, v in wrapped.state_dict().items()}
    for name, job in jobs(masks).items():
        with pytest.raises(ProxsparseError, match="merge the adapter first"):
            job(wrapped)
        assert all(torch.equal(v, before[k]) for k, v in wrapped.state_dict().items()), name


def test_a_merged_model_is_an_ordinary_one(pruned: Any) -> None:
    model = pruned()
    masks = masks_of(model)
    merged = adapted(model, "get_peft_model").merge_and_unload()
    apply_masks_(merged, masks)
    assert len(masks_of(merged)) == len(masks)


@pytest.mark.parametrize("wrap", [torch.compile, lambda m: torch.nn.Sequential(m)])
def test_wrappers_are_refused(pruned: Any, wrap: Any) -> None:
    with pytest.raises(ProxsparseError, match="wrapper"):
        masks_of(wrap(pruned()))


@pytest.mark.parametrize("way", ["disk", "cpu", "meta"])
def test_offloaded_models(pruned: Any, way: str, tmp_path: Path) -> None:
    model = pruned()
    masks = masks_of(model)
    if way == "disk":
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    elif way == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        model.to("meta")
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    todo = jobs(masks)
    read, sparsify = todo.pop("masks_of"), todo.pop("sparsify_")
    for job in todo.values():
        with pytest.raises(ProxsparseError, match=r"q_proj is not in memory"):
            job(model)
    if way == "meta":
        for job in (read, sparsify):
            with pytest.raises(ProxsparseError, match="not in memory"):
                job(model)
        return
    assert {k: v.tolist() for k, v in read(model).codes.items()} == {
        k: v.tolist() for k, v in masks.codes.items()
    }
    sparsify(model)
    assert any(isinstance(m, SparseLinear) for m in model.modules())


def test_keep_masks_after_prepare(pruned: Any) -> None:
    model = pruned()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    masks = masks_of(model)
    handle = keep_masks_(model, optimizer)
    for _ in range(2):
        x = torch.randint(3, 96, (2, 8))
        accelerator.backward(model(input_ids=x, labels=x).loss)
        optimizer.step()
        optimizer.zero_grad()
    for target in find_targets(model).layers:
        assert not target.weight()[~masks[target.parameter_name]].any()
    handle.remove()
    with pytest.raises(ProxsparseError, match="object is no optimiser of torch"):
        keep_masks_(model, object())  # type: ignore[arg-type]


def test_a_weight_of_zeros_is_not_a_pruned_one(pruned: Any) -> None:
    model = pruned()
    up = model.model.layers[1].mlp.up_proj
    up.weight.data.zero_()
    assert "model.layers.1.mlp.up_proj.weight" not in masks_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keep_masks_(model, optimizer)
    up.weight.grad = torch.ones_like(up.weight)
    optimizer.step()
    assert (up.weight != 0).all()
    up.weight.data.zero_()
    report = sparsify_(model)
    assert "zero throughout" in report.left_dense["model.layers.1.mlp.up_proj"]
    with pytest.raises(ProxsparseError, match="cannot be sparse: it is zero throughout"):
        sparsify_(model, targets=("layers.1.mlp.up_proj",))
