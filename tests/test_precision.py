"""Widening to float32 and back returns every bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from proxsparse.errors import ProxsparseError
from proxsparse.models.precision import computing_in, eval_mode, resolve_dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computing_in_float32_restores_every_dtype(tiny_model: Any, dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    model.model.norm.weight.data = model.model.norm.weight.data.float()  # a mixed model
    before = {name: p.clone() for name, p in model.named_parameters()}
    with computing_in(model, torch.float32):
        assert all(p.dtype == torch.float32 for p in model.parameters())
    for name, p in model.named_parameters():
        assert p.dtype == before[name].dtype and torch.equal(p, before[name])


def test_rounding_is_refused(tiny_model: Any) -> None:
    model = tiny_model("llama")
    with pytest.raises(ProxsparseError, match="would round"), computing_in(model, torch.bfloat16):
        pass
    with pytest.raises(ProxsparseError, match="'half': choose auto, float32"):
        resolve_dtype("half", model)
    assert resolve_dtype("auto", model) is torch.float32


def test_eval_mode_gives_each_module_its_own_mode_back(tiny_model: Any) -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training and not model.model.layers[0].training
