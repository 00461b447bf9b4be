"""One module in the place of another, wherever the model holds it and under accelerate's hooks."""

from __future__ import annotations

from typing import Any

from torch import nn

from proxsparse.inference.sparse_linear import sparse_layers
from proxsparse.models.offload import in_memory


def restore_layers_(model: nn.Module) -> tuple[str, ...]:
    """The replacement of `densify_` alone; returns the names of the layers that were sparse."""
    names, places = tuple(sparse_layers(model)), places_of(model)
    for name in names:
        old: Any = model.get_submodule(name)
        with in_memory(old):
            new = old.to_linear()
        replace_(places, old, new)
        del old
    return names


def places_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The id of each module -> every (parent, name) that holds it: a module may be shared."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, name))
    return places


def replace_(
    places: dict[int, list[tuple[nn.Module, str]]], old: nn.Module, new: nn.Module
) -> None:
    """Put `new` wherever `old` is, under the hook that accelerate has on it, if any."""
    hook: Any = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        for part in getattr(hook, "hooks", (hook,)):
            if getattr(part, "offload", False):
                # Its map has the old tensors' names; without one it takes up those of `new`.
                part.weights_map, part.offload_buffers = None, True
        add_hook_to_module(new, hook)
    for parent, name in places.pop(id(old)):
        parent._modules[name] = new
