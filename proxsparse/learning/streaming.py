"""What a large model never holds all at once: its current weights, its gradients, its logits.

The parameters of the model stay the original weights. While a decoder block runs, those of its
targets point to one scratch buffer that holds the weights the block computes with now, made on the
spot. The block's activations are not kept but computed again in the backward pass, weights
included, and each layer's gradient is handed over and dropped as soon as it is there. The price is
one more forward pass.

Why one buffer is enough: autograd runs all of a block's backward before it reaches the block that
came before it, and a parameter's gradient is complete only when nothing else will read its weight.
What the recomputation saves for the backward refers to the buffer's memory, so the parameters point
to the original weights again as soon as the block's forward ends.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from proxsparse.models.precision import autocast
from proxsparse.models.targets import Target, Targets

_log = logging.getLogger("proxsparse")

LOGITS_AT_ONCE = 2**26  # elements: 256 MiB in float32, and products large enough for any GPU
_ALIGNMENT = 256  # bytes, of a weight in the scratch buffer

Write = Callable[[Target, Tensor], None]
Inside = Callable[[nn.Module], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def replacing_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context `module` runs `forward`; its hooks run as ever."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


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


def chunked_next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """`evaluate.next_token_loss` of tokens [B, L], a piece of the logits at a time.

    The head is taken out of the model's forward, and applied to `LOGITS_AT_ONCE` logits at a time;
    the backward pass computes them again. Only right for models whose logits are what their head
    returns, see `can_chunk`.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    hidden = _without_head(model, head, tokens)
    x, y = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    size = max(1, LOGITS_AT_ONCE // _vocab_size(model))

    def total(x: Tensor, y: Tensor) -> Tensor:
        with autocast(model):
            logits = head(x)
        return nn.functional.cross_entropy(logits.float(), y, reduction="sum")

    pieces = zip(torch.split(x, size), torch.split(y, size), strict=True)
    losses = [checkpoint(total, *piece, use_reentrant=False) for piece in pieces]
    return torch.stack(losses).sum() / y.numel()


@torch.no_grad()
def can_chunk(model: nn.Module, tokens: Tensor) -> bool:
    """Whether the model's logits are, bit for bit, what its head returns; tried on some tokens.

    Not so where logits are scaled, capped or masked after the head: those models get their logits
    whole, and the log says so.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    sample = tokens[:1, :64]
    with autocast(model):
        logits = model(input_ids=sample, use_cache=False).logits
        try:
            same = head is not None and torch.equal(
                head(_without_head(model, head, sample)).float(), logits.float()
            )
        except RuntimeError:  # what comes out without the head is not what goes into it
            same = False
    if not same:
        _log.info(
            "%s changes its logits after the head, so they are held whole", type(model).__name__
        )
    return same


def _without_head(model: nn.Module, head: nn.Module, tokens: Tensor) -> Tensor:
    """The hidden states [B, L, H] that the model gives to its head."""
    with replacing_forward(head, lambda x: x), autocast(model):
        hidden: Tensor = model(input_ids=tokens, use_cache=False).logits
    return hidden.to(next(head.parameters()).dtype)  # some models widen what they call logits


def _vocab_size(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)
