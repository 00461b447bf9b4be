"""What a large model never holds all at once: its current weights, its gradients, its logits.

The parameters of the model stay the original weights. While a decoder block runs, those of its
targets point to one scratch buffer that holds the weights the block computes with now, made on the
spot. The block's activations are not kept but recomputed in the backward pass, weights included,
and each layer's gradient is handed over and dropped as soon as it is there. The price is one more
forward pass.

Why one buffer is enough: autograd runs all of a block's backward before it reaches the block that
came before it, and a parameter's gradient is complete only when nothing else will read its weight.
What the recomputation saves for the backward refers to the buffer's memory, so the parameters point
to the original weights again as soon as the block's forward ends.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from proxsparse.models.forward import replacing_forward
from proxsparse.models.targets import Target, Targets

_ALIGNMENT = 256  # bytes, of a weight in the scratch buffer

Write = Callable[[Target, Tensor], None]
Inside = Callable[[nn.Module], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def recomputing(modules: Iterable[nn.Module], inside: Inside) -> Iterator[None]:
    """Keep no activations of `modules` but their inputs: the backward pass runs them again.

    Args:
        modules: what to run twice, typically the decoder blocks.
        inside: a module to the context that its forward runs in, both times.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(replacing_forward(module, _twice(module, inside)))
        yield


def _twice(module: nn.Module, inside: Inside) -> Callable[..., Any]:
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with inside(module):
            return forward(*args, **kwargs)

    # Nothing random is recomputed: models learn in eval mode.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return lambda *args, **kwargs: checkpoint(run, *args, **options, **kwargs)


@contextlib.contextmanager
def weights_on_demand(targets: Targets, write: Write) -> Iterator[None]:
    """Within the context every target computes with what `write` says, made when it is needed.

    Args:
        targets: the layers, and the blocks that are recomputed. A target outside the blocks (an
            lm_head) is a block of its own.
        write: called with a target and a buffer [N, K] or [E, N, K] of its weight's dtype, to fill
            with the weight of this moment; twice per step and target. The buffer is not contiguous
            where the model stores the transpose.

    Memory: the weights of the largest block, once.
    """
    units = _units(targets)
    sizes = [sum(_num_bytes(t.parameter) for t in unit) for unit in units.values()]
    first = targets.layers[0].parameter
    scratch = torch.empty(max(sizes), dtype=torch.uint8, device=first.device)
    views = {module: _carve(scratch, unit) for module, unit in units.items()}

    @contextlib.contextmanager
    def holding(module: nn.Module) -> Iterator[None]:
        kept = []
        try:
            for target, view in views[module]:
                with torch.no_grad():
                    write(target, target.canonical(view))
                kept.append((target.parameter, target.parameter.data))
                target.parameter.data = view
            yield
        finally:
            for parameter, original in kept:
                parameter.data = original

    with recomputing(units, holding):
        yield


def _units(targets: Targets) -> dict[nn.Module, list[Target]]:
    """Module to run twice -> the targets whose weights it uses."""
    home = {module: block for block in targets.blocks for module in block.modules()}
    units: dict[nn.Module, list[Target]] = {block: [] for block in targets.blocks}
    for target in targets.layers:
        for module in (target.module, *target.sharers):
            unit = units.setdefault(home.get(module, module), [])
            if target not in unit:
                unit.append(target)
    return units


def _num_bytes(parameter: Tensor) -> int:
    size = parameter.numel() * parameter.element_size()
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def _carve(scratch: Tensor, unit: Sequence[Target]) -> list[tuple[Target, Tensor]]:
    """A part of the buffer for each target, in the layout of its parameter."""
    views, offset = [], 0
    for target in unit:
        p = target.parameter
        part = scratch[offset : offset + p.numel() * p.element_size()]
        views.append((target, part.view(p.dtype).view(p.shape)))
        offset += _num_bytes(p)
    return views


@contextlib.contextmanager
def consuming_gradients(layers: Iterable[Target], consume: Write) -> Iterator[None]:
    """Call `consume(target, gradient)` once the backward pass has a layer's gradient; then drop it.

    The gradient is [N, K] or [E, N, K]. At that moment nothing reads the layer's weight any more in
    this backward pass, so `consume` may change it.
    """

    def hook(target: Target) -> Callable[[Tensor], None]:
        def run(parameter: Tensor) -> None:
            assert parameter.grad is not None
            consume(target, target.canonical(parameter.grad))
            parameter.grad = None

        return run

    handles = []
    for target in layers:
        register: Any = target.parameter.register_post_accumulate_grad_hook
        handles.append(register(hook(target)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
