"""The loss of a language model, whole or in chunks of the logits."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from proxsparse.models.forward import replacing_forward
from proxsparse.models.precision import autocast

_log = logging.getLogger(__name__)

LOGITS_AT_ONCE = 2**26  # elements: 256 MiB in float32, and products large enough for any GPU


def chunked_next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """`next_token_loss` of tokens [B, L], a piece of the logits at a time.

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


def next_token_loss(model: nn.Module, tokens: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of tokens [B, L] given their predecessors, in float32."""
    with autocast(model):
        logits = model(input_ids=tokens, use_cache=False).logits
    logits = logits[:, :-1].float()
    return nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1), reduction=reduction
    )
