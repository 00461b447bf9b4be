"""Training on under fixed masks: any optimiser, and the merge of an adapter."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proxsparse import (
    ProxsparseError,
    apply_masks_,
    check_masks,
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


def test_masks_are_checked(pruned: Callable[[str], Any]) -> None:
    model = pruned("gpt2")
    masks = masks_of(model)
    check_masks(model, masks)
    w = find_targets(model).layers[3].weight()
    w[~masks[find_targets(model).layers[3].parameter_name]] = -0.0
    with pytest.raises(ProxsparseError, match=r"has [\d,]+ pruned weights that are not zero"):
        check_masks(model, masks)


class Wrapped:
    """As libraries wrap an optimiser: it is in an attribute."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_wrapped_optimisers(pruned: Callable[[str], Any]) -> None:
    model = pruned("llama")
    masks, optimizer = dict(masks_of(model)), torch.optim.AdamW(model.parameters(), lr=0.1)
    wrapped: Any = Wrapped(Wrapped(optimizer))
    keep_masks_(model, wrapped)
    train(model, optimizer, 2)
    assert_masked(model, masks)
    with pytest.raises(ProxsparseError, match="list is no optimiser"):
        keep_masks_(model, [])


FSDP = """
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, LlamaConfig, AutoModelForCausalLM
from proxsparse import ProxsparseError, check_masks, keep_masks_, masks_of, ops
from proxsparse.models.targets import find_targets

torch.distributed.init_process_group("gloo")
small = {"vocab_size": 96, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}
gpt2 = GPT2Config(vocab_size=96, n_embd=36, n_head=4, n_layer=2, n_positions=64)
for config in (LlamaConfig(**small), gpt2):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for target in find_targets(model).layers:
        target.set_weight_(ops.project_2to4(target.weight()))
    masks = masks_of(model)
    for module in list(model.modules())[::-1]:
        if type(module).__name__.endswith(("DecoderLayer", "Block")):
            fully_shard(module)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    try:
        keep_masks_(model, optimizer)
        raise SystemExit("masks cannot be read off a split model")
    except ProxsparseError as error:
        assert "take masks_of(model) before it is split" in str(error)
    keep_masks_(model, optimizer, masks)
    x = torch.randint(3, 96, (2, 8))
    for _ in range(3):
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    check_masks(model, masks)
    changed = 0
    for target in find_targets(model, names=frozenset(masks)).layers:
        parameter = target.parameter
        assert isinstance(parameter, DTensor)
        whole = parameter.full_tensor()
        whole = whole.mT if target.transposed else whole
        mask = masks[target.parameter_name]
        assert not whole[~mask].any(), target.name
        changed += int((whole != 0).sum())
    assert changed > 0
    with torch.no_grad():
        target.parameter.to_local().add_(1.0)
    try:
        check_masks(model, masks)
        raise SystemExit("not seen")
    except ProxsparseError:
        pass
torch.distributed.destroy_process_group()
"""


def test_models_split_by_fsdp2() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank in range(2):
        meeting = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        meeting |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", FSDP],
                cwd=Path(__file__).resolve().parents[1],
                env={**os.environ, **meeting},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
