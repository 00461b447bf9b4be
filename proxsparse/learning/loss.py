"""What learning minimises, whole or a piece of the logits at a time.

The logits of a step, tokens x vocabulary, can outweigh everything else a step holds. In pieces
neither they nor their gradients ever exist whole: the head is taken out of the model's forward and
applied to some tokens at a time, and the gradient of each piece is computed along with its loss, so
that no piece is computed twice.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from proxsparse.models.forward import replacing_forward
from proxsparse.models.positions import text_config
from proxsparse.models.precision import autocast

_log = logging.getLogger(__name__)

LOGITS_AT_ONCE = 2**25  # elements: 128 MiB in float32, and products large enough for any GPU

Loss = Callable[[nn.Module, Tensor], Tensor]
Dense = Callable[[], contextlib.AbstractContextManager[None]]


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of tokens [B, L] given their predecessors, in float32."""
    logits = _logits(model, tokens)[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())


def chunked_next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """`next_token_loss` a piece at a time; only right for a model that `can_chunk`."""
    head = _head(model)
    targets = tokens[:, 1:].flatten()

    def total(x: Tensor, rows: slice) -> Tensor:
        with autocast(model):
            logits = head(x)
        return nn.functional.cross_entropy(_wide(logits), targets[rows], reduction="sum")

    hidden = _without_head(model, head, tokens)[:, :-1].flatten(0, 1)
    return _in_pieces(total, model, hidden) / targets.numel()


def divergence_loss(model: nn.Module, tokens: Tensor, dense: Dense) -> Tensor:
    """KL of the next token's distribution from the dense model's, a mean over tokens [B, L], nats.

    Args:
        model: the model.
        tokens: int64 [B, L].
        dense: within the context the model computes with its original weights.
    """
    with torch.no_grad(), dense():
        expected = _logits(model, tokens)
    return _divergence(_logits(model, tokens), expected) / tokens.numel()


def chunked_divergence_loss(
    model: nn.Module, tokens: Tensor, dense: Dense, dense_head: Dense
) -> Tensor:
    """`divergence_loss` a piece at a time; only right for a model that `can_chunk`.

    Args:
        model: the model.
        tokens: int64 [B, L].
        dense: as for `divergence_loss`.
        dense_head: within the context the head computes with its original weight.
    """
    head = _head(model)
    with torch.no_grad(), dense():
        theirs = _without_head(model, head, tokens).flatten(0, 1)

    def total(x: Tensor, rows: slice) -> Tensor:
        with autocast(model):
            with torch.no_grad(), dense_head():
                expected = head(theirs[rows])
            return _divergence(head(x), expected)

    hidden = _without_head(model, head, tokens).flatten(0, 1)
    return _in_pieces(total, model, hidden) / tokens.numel()


def _divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """KL(softmax(expected) || softmax(logits)) summed over all rows, in float32 or wider."""
    return nn.functional.kl_div(
        _wide(logits).log_softmax(-1),
        _wide(expected).log_softmax(-1),
        reduction="sum",
        log_target=True,
    )


def _in_pieces(
    total: Callable[[Tensor, slice], Tensor], model: nn.Module, hidden: Tensor
) -> Tensor:
    """The sum of `total(hidden[rows], rows)` over rows of at most `LOGITS_AT_ONCE` logits."""
    size = max(1, LOGITS_AT_ONCE // text_config(model).vocab_size)
    learned = [p for p in _head(model).parameters() if p.requires_grad]
    result: Tensor = _InPieces.apply(total, size, hidden, *learned)  # type: ignore[no-untyped-call]
    return result


class _InPieces(torch.autograd.Function):
    """Computes a piece's gradients right after its loss, so that its logits can go."""

    @staticmethod
    def forward(
        ctx: Any,
        total: Callable[[Tensor, slice], Tensor],
        size: int,
        hidden: Tensor,
        *learned: nn.Parameter,
    ) -> Tensor:
        sums: list[Tensor] = []
        losses, gradients = [], []
        for begin in range(0, hidden.shape[0], size):
            rows = slice(begin, begin + size)
            with torch.enable_grad():
                x = hidden[rows].detach().requires_grad_()
                loss = total(x, rows)
                of_x, *of_learned = torch.autograd.grad(loss, (x, *learned))
            losses.append(loss.detach())
            gradients.append(of_x)
            sums = [a + b for a, b in zip(sums, of_learned, strict=True)] if sums else of_learned
        ctx.save_for_backward(torch.cat(gradients), *sums)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return None, None, *(outer[0].to(g.dtype) * g for g in ctx.saved_tensors)


@torch.no_grad()
def can_chunk(model: nn.Module, tokens: Tensor) -> bool:
    """Whether the model's logits are, bit for bit, what its head returns; tried on some tokens.

    Not so where logits are scaled, capped or masked after the head: those models get their logits
    whole, and the log says so.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    sample = tokens[:1, :64]
    logits = _logits(model, sample)
    try:
        with autocast(model):
            same = head is not None and torch.equal(
                _wide(head(_without_head(model, head, sample))), logits
            )
    except RuntimeError:  # what comes out without the head is not what goes into it
        same = False
    if not same:
        _log.info(
            "%s changes its logits after the head, so they are held whole", type(model).__name__
        )
    return same


def _head(model: nn.Module) -> nn.Module:
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    return head


def _without_head(model: nn.Module, head: nn.Module, tokens: Tensor) -> Tensor:
    """The hidden states [B, L, H] that the model gives to its head."""
    with replacing_forward(head, lambda x: x), autocast(model):
        hidden: Tensor = model(input_ids=tokens, use_cache=False).logits
    return hidden.to(next(head.parameters()).dtype)  # some models widen what they call logits


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """The logits [B, L, V], in float32 or wider."""
    with autocast(model):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return _wide(logits)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
