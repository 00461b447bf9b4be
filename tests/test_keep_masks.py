"""Training on under fixed masks: any optimiser, and the merge of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from proxsparse import (
    ProxsparseError,
    apply_masks_,
    densify_,
    keep_masks_,
    masks_of,
    ops,
    sparsify_,
)
from proxsparse.models.targets import find_targets

OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.fixture
def pruned(tiny_model: Any) -> Callable[[str], Any]:
    def make(name: str) -> Any:
        model = tiny_model(name)
        for target in find_targets(model).layers:
            target.set_weight_(ops.project_2to4(target.weight()))
        return model

    return make


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        x = torch.randint(3, 96, (2, 8))
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_masked(model: Any, masks: dict[str, Tensor]) -> None:
    for target in find_targets(model).layers:
        pruned = target.weight()[~masks[target.parameter_name]]
        assert not pruned.any() and not pruned.signbit().any(), target.name


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_masks_hold_under_any_optimiser(
    pruned: Callable[[str], Any], name: str, optimiser: str
) -> None:
    model = pruned(name)
    masks, before = dict(masks_of(model)), {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = OPTIMISERS[optimiser](model.parameters())
    handle = keep_masks_(model, optimizer)
    train(model, optimizer, 3)
    assert_masked(model, masks)
    for target in find_targets(model).layers:
        w = model.state_dict()[target.parameter_name]
        assert not torch.equal(w, before[target.parameter_name])
    handle.remove()
    train(model, optimizer, 1)
    with pytest.raises(AssertionError):
        assert_masked(model, masks)


def test_masks_given_are_applied_at_once(pruned: Callable[[str], Any], tiny_model: Any) -> None:
    masks, model = masks_of(pruned("llama")), tiny_model("llama")
    keep_masks_(model, torch.optim.SGD(model.parameters(), lr=0.1), masks)
    assert_masked(model, dict(masks))


def test_masks_survive_the_merge_of_an_adapter(pruned: Callable[[str], Any]) -> None:
    model = pruned("llama")
    masks, before = masks_of(model), model.model.layers[0].mlp.up_proj.weight.clone()
    with torch.no_grad():
        for target in find_targets(model).layers:
            n, k = target.shape
            target.parameter.add_(0.1 * torch.randn(n, 4) @ torch.randn(4, k))
    with pytest.raises(AssertionError):
        assert_masked(model, dict(masks))
    apply_masks_(model, masks)
    assert_masked(model, dict(masks))
    after = model.model.layers[0].mlp.up_proj.weight
    kept = masks["model.layers.0.mlp.up_proj.weight"]
    assert (after[kept] != before[kept]).all()
    assert len(sparsify_(model).sparse) == 14


def test_from_sparse_to_trained_and_back(pruned: Callable[[str], Any]) -> None:
    model = pruned("llama")
    sparsify_(model)
    with pytest.raises(ProxsparseError, match="make it dense first"):
        keep_masks_(model, torch.optim.SGD(model.parameters(), lr=0.1))
    densify_(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    keep_masks_(model, optimizer)
    train(model, optimizer, 2)
    assert len(sparsify_(model).sparse) == 14


def test_a_dense_model_shows_no_masks(tiny_model: Any) -> None:
    with pytest.raises(ProxsparseError, match="no layer of LlamaForCausalLM is 2:4"):
        masks_of(tiny_model("llama"))
