"""LoRA adapters of peft on packed layers: trained, saved, loaded, and merged.

`get_peft_model(packed, LoraConfig(target_modules="all-linear"))` works as on a dense model. peft
takes layers it does not know through its custom modules, which a config names; `prepare` names ours
for every config that meets a packed model (see `registration`, which has peft call it).

A merge has two ways to end. What an adapter adds is dense, so peft's `merge_and_unload` gives dense
layers, which lose nothing and gain no speed. `merge_and_pack` keeps the masks: what the adapter
would add to pruned weights is dropped, and how much that is, is reported.

This module needs peft, and is imported when an adapter meets a packed model.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from proxsparse.errors import ProxsparseError
from proxsparse.inference.quantizer import detach
from proxsparse.inference.sparse_linear import SparseLinear, sparse_layers

_ALL_LINEAR = "all-linear"
# The model that a packed layer belongs to, and its name there: a merge makes it dense.
_HOMES: weakref.WeakKeyDictionary[SparseLinear, tuple[weakref.ref[Any], str]]
_HOMES = weakref.WeakKeyDictionary()


def prepare(config: Any, model: nn.Module) -> None:
    """Make a config of LoRA fit for a packed model; of another model it stays as it is.

    Args:
        config: peft's `LoraConfig`; gets our layer among its custom modules, and names in the place
            of "all-linear", which would leave packed layers out.
        model: that adapters are put on.
    """
    layers = sparse_layers(model)
    if not layers:
        return
    config._register_custom_module({SparseLinear: SparseLora})
    for name, layer in layers.items():
        _HOMES[layer] = (weakref.ref(model), name)
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        config.target_modules = {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D | SparseLinear) and module is not head
        }


class SparseLora(LoraLinear):
    """A packed layer with LoRA adapters beside it."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        self.fan_in_fan_out = False  # packed weights are [N, K], whatever they were before

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Plain LoRA alone: the variants of it write to the base weight, or read it each step."""
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the layer, which becomes dense for that; `unmerge` packs it again."""
        base = self.get_base_layer()
        if isinstance(base, SparseLinear):
            self._packed = (base,)  # in a tuple: it is no submodule now
            self.base_layer = base.to_linear()
            self.fan_in_fan_out = base.is_conv1d
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """Take the adapters out again: the packed layer is back, bit by bit."""
        if not self.merged:
            super().unmerge()  # warns
            return
        self.merged_adapters.clear()
        (self.base_layer,) = self._packed
        self.fan_in_fan_out = False

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The layer without its adapters: packed, or merged and dense."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base: nn.Module = self.get_base_layer()
        if not isinstance(base, SparseLinear):
            _forget(*self._packed)
        return base


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What a merge under the masks dropped.

    Attributes:
        dropped: layer -> share of the adapter's change that fell on pruned weights, 0 to 1: the sum
            of squares there over the sum of all squares.
    """

    dropped: dict[str, float]

    @property
    def mean_dropped(self) -> float:
        """The mean over the layers."""
        return sum(self.dropped.values()) / max(1, len(self.dropped))

    def __repr__(self) -> str:
        return (
            f"MergeReport: {len(self.dropped)} layers merged and packed, "
            f"{self.mean_dropped:.0%} of the adapters' change dropped"
        )


@torch.no_grad()
def merge_and_pack(model: Any) -> tuple[nn.Module, MergeReport]:
    """Merge the active adapters of a packed model, and keep it packed.

    The masks stay: what the adapters add to a kept weight is added, what they add to a pruned one
    is dropped, which costs quality. The report says how much was dropped; measure the model before
    and after. `model.merge_and_unload()` drops nothing and gives a dense model.

    Args:
        model: a `PeftModel` with LoRA adapters on a packed model. It is used up.

    Returns:
        The packed model without adapters, and what was dropped.

    Raises:
        ProxsparseError: no adapter on a packed layer, or one that is merged already.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLora)}
    if not layers:
        raise ProxsparseError(
            f"{type(model).__name__} has no LoRA adapter on a packed layer: pass the model that "
            "get_peft_model returned"
        )
    dropped = {}
    for name, layer in layers.items():
        if layer.merged:
            raise ProxsparseError(f"{name} is merged already: call model.unmerge_adapter() first")
        base = layer.get_base_layer()
        assert isinstance(base, SparseLinear)  # until it is merged
        weight = base.weight
        delta = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                delta += layer.get_delta_weight(adapter).float()
                _merge_bias(layer, base, adapter)
        kept = _mask(base)
        total = delta.square().sum()
        home = _HOMES.get(base)
        dropped[home[1] if home else name] = (
            float((delta.square() * ~kept).sum() / total) if total > 0 else 0.0
        )
        merged = (weight.float() + delta).to(weight.dtype)
        base.values = merged[kept].view(base.values.shape)
        base.refresh_()
    for module in model.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, SparseLora):
            module.merge()
    return model.unload(), MergeReport(dropped)


def _merge_bias(layer: Any, base: SparseLinear, adapter: str) -> None:
    bias = layer.lora_B[adapter].bias
    if bias is None:
        return
    if base.bias is None:
        raise ProxsparseError(
            "an adapter with lora_bias=True cannot be merged into a layer without a bias: train it "
            "with lora_bias=False"
        )
    base.bias.add_((bias * layer.scaling[adapter]).to(base.bias.dtype))


def _mask(layer: SparseLinear) -> Tensor:
    """Which weights are kept, bool [N, K]; where a kept one is zero as well."""
    from proxsparse import ops

    ones = torch.ones_like(layer.values)
    return ops.unpack_2to4(ones, ops.code_rows(layer.values, layer.codes)) != 0


def _forget(layer: SparseLinear) -> None:
    """Say in the config of its model that a layer is packed no more."""
    home = _HOMES.pop(layer, None)
    model = home[0]() if home else None
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if home is None or config is None or home[1] not in config.layers:
        return
    config.layers.remove(home[1])
    if not config.layers:
        detach(model)
