"""What each layer sees, block by block, with the pruned earlier blocks in effect.

No decoder is replayed by hand. The model's own forward runs; blocks already done return their
stored output instead of computing it, the block before the current one runs pruned, the current one
runs dense under observation, and the pass ends there. So every block is computed twice in all, with
the arguments its own model gives it, and only one block's statistics exist at a time.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from proxsparse.errors import ProxsparseError
from proxsparse.models.forward import replacing_forward
from proxsparse.models.observe import observe_inputs
from proxsparse.models.precision import autocast, eval_mode
from proxsparse.models.targets import Target, Targets
from proxsparse.progress import progress

_log = logging.getLogger(__name__)


class Statistic:
    """What is gathered of a layer's inputs.

    Attributes:
        sum: running sum over tokens; of experts, with a leading dimension.
        tokens: how many each expert, or the layer, has seen; 1-D, one element for a plain layer.
    """

    def __init__(self, shape: tuple[int, ...], num_experts: int, device: torch.device) -> None:
        self.sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self.tokens = [0] * num_experts

    def check(self, name: str) -> None:
        """Refuse to choose by inputs that say nothing.

        Raises:
            ProxsparseError: there were none, or some are NaN, infinite or too large to square.
        """
        if not any(self.tokens):
            raise ProxsparseError(
                f"{name} saw no input from the calibration text, so nothing can be said about it: "
                "leave it dense with --ignore, or use --method magnitude"
            )
        if not torch.isfinite(self.sum).all():
            raise ProxsparseError(
                f"the inputs of {name} are NaN, infinite or too large to square in float32: the "
                "model overflows on this text; try --dtype float32, or leave the layer dense with "
                "--ignore"
            )
        unseen = self.tokens.count(0)
        if unseen:
            _log.warning(
                "%s: %d of %d experts saw no token and are pruned by magnitude; more calibration "
                "text may reach them",
                name,
                unseen,
                len(self.tokens),
            )


class InputNorm(Statistic):
    """Running sum of squares of each input feature; [K], or [E, K] for experts."""

    def __init__(self, target: Target, device: torch.device) -> None:
        *experts, _, k = target.shape
        super().__init__((*experts, k), math.prod(experts), device)

    def add(self, expert: int | None, x: Tensor) -> None:
        """Count inputs x [tokens, K] of one expert (None for a plain layer)."""
        self.tokens[expert or 0] += x.shape[0]
        total = self.sum if expert is None else self.sum[expert]
        total += x.float().square().sum(0)

    def norm(self) -> Tensor:
        """||X_k|| relative to the layer's mean, floored at 1e-3 so that no feature is worthless.

        An expert that saw no token gets 1 everywhere: its weights are ranked by magnitude.
        """
        norm = self.sum.sqrt()
        mean = norm.mean(-1, keepdim=True)
        return torch.where(mean > 0, norm / mean, 1.0).clamp_min(1e-3)


class Gram(Statistic):
    """Running X^T X of a layer's inputs; [K, K], or [E, K, K] for experts."""

    def __init__(self, target: Target, device: torch.device) -> None:
        *experts, _, k = target.shape
        super().__init__((*experts, k, k), math.prod(experts), device)

    def add(self, expert: int | None, x: Tensor) -> None:
        """Count inputs x [tokens, K] of one expert (None for a plain layer)."""
        self.tokens[expert or 0] += x.shape[0]
        total = self.sum if expert is None else self.sum[expert]
        x = x.float()
        total.addmm_(x.T, x)


@torch.no_grad()
def collect_input_norms(model: nn.Module, targets: Targets, tokens: Tensor) -> dict[str, Tensor]:
    """Each target's `InputNorm.norm()` in the model as it is, in one pass over tokens [S, L].

    Raises:
        ProxsparseError: a target saw no input, or one that is not finite.
    """
    device = next(model.parameters()).device
    norms = {t.name: InputNorm(t, device) for t in targets.layers}
    with (
        eval_mode(model),
        observe_inputs(targets.layers, lambda t, e, x: norms[t.name].add(e, x)),
    ):
        for batch in progress(_batches(tokens), "activations", "batch"):
            with autocast(model):
                model(input_ids=batch.to(device), use_cache=False)
    for name, norm in norms.items():
        norm.check(name)
    return {name: norm.norm() for name, norm in norms.items()}


@torch.no_grad()
def prune_block_by_block(
    model: nn.Module,
    targets: Targets,
    tokens: Tensor,
    statistic: type[InputNorm] | type[Gram],
    prune: Callable[[Target, Any], None],
) -> None:
    """Call `prune(target, statistic)` for every target, in the order of the blocks.

    Args:
        model: the model; `prune` is expected to change the target's weight in place.
        targets: what to visit.
        tokens: int64 [S, L] calibration blocks.
        statistic: what to gather of each target's inputs.
        prune: receives the target and its filled statistic; free to release it.

    Raises:
        ProxsparseError: a target saw no input, or one that is not finite.
    """
    device = next(model.parameters()).device
    batches = _batches(tokens)
    outputs: list[Any] = [None] * len(batches)
    last = max(t.block for t in targets.layers)  # past the blocks where lm_head is a target
    stages = range(last + 1)
    for index in progress(stages, "pruning", "block"):
        layers = [t for t in targets.layers if t.block == index]
        statistics = {t.name: statistic(t, device) for t in layers}

        def add(t: Target, e: int | None, x: Tensor, seen: dict[str, Any] = statistics) -> None:
            seen[t.name].add(e, x)

        for i, batch in enumerate(batches):
            with (
                eval_mode(model),
                _stopping_after(targets.blocks[index : index + 1]),
                observe_inputs(layers, add),
                _skipping(targets.blocks[: max(index - 1, 0)], outputs[i]),
                _storing(targets.blocks[index - 1] if index else None, outputs, i),
                contextlib.suppress(_Stop),
                autocast(model),
            ):
                model(input_ids=batch.to(device), use_cache=False)
        for target in layers:
            statistics[target.name].check(target.name)
            prune(target, statistics.pop(target.name))


class _Stop(Exception):
    """Ends a forward pass once the current block has run."""


def _batches(tokens: Tensor) -> tuple[Tensor, ...]:
    """At most 16,384 tokens a pass: enough to fill a GPU, little enough to hold beside a model."""
    return torch.split(tokens, max(1, 16384 // tokens.shape[1]))


@contextlib.contextmanager
def _stopping_after(blocks: tuple[nn.Module, ...]) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _Stop

    handles = [block.register_forward_hook(stop) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _skipping(blocks: tuple[nn.Module, ...], output: Any) -> Iterator[None]:
    """Let each of `blocks` return `output` at once; the last of them decides what follows."""
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replacing_forward(block, lambda *_, **__: output))
        yield


@contextlib.contextmanager
def _storing(block: nn.Module | None, outputs: list[Any], index: int) -> Iterator[None]:
    """Keep what `block` returns in outputs[index]."""
    if block is None:
        yield
        return

    def store(_: nn.Module, __: Any, output: Any) -> None:
        outputs[index] = output

    handle = block.register_forward_hook(store)
    try:
        yield
    finally:
        handle.remove()
