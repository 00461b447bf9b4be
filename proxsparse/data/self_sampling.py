"""Calibration without data: text sampled from the dense model itself, one block at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from proxsparse.data.tokenizing import added_prefix, check_room
from proxsparse.errors import ProxsparseError
from proxsparse.models.positions import text_config
from proxsparse.models.precision import autocast
from proxsparse.progress import Progress

_SAMPLING_TOKENS = 32768  # tokens per batch sampled from a model: bounds its key-value cache


@torch.no_grad()
def sample_texts(
    model: nn.Module | None, tokenizer: Any, num_samples: int, length: int, seed: int
) -> Tensor:
    """Blocks [num_samples, length] of the model's own text, at temperature 1.

    A block begins with what the tokenizer puts before every text; where that is nothing, with the
    beginning-of-text token, and where there is none, with a random one. It goes on through
    end-of-text tokens. All randomness comes from a generator of its own on the model's device: the
    global state is untouched, and a seed gives the same text on the same device.
    """
    if model is None:
        raise ProxsparseError("calibration 'self' samples from the model: pass the model")
    config = text_config(model)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    bos = getattr(tokenizer, "bos_token_id", None)
    bos = getattr(config, "bos_token_id", None) if bos is None else bos
    begin_with = added_prefix(tokenizer) or ([] if bos is None else [bos])
    check_room(begin_with, length)
    size = config.vocab_size if tokenizer is None else min(config.vocab_size, len(tokenizer))
    per_batch = max(1, _SAMPLING_TOKENS // length)
    was_training = model.training
    model.eval()
    blocks = []
    total = num_samples * (length - max(1, len(begin_with)))
    try:
        with Progress("sampling", total, unit="token") as bar:
            for begin in range(0, num_samples, per_batch):
                count = min(per_batch, num_samples - begin)
                if begin_with:
                    first = torch.tensor(begin_with, device=device).expand(count, -1)
                else:
                    first = torch.randint(size, (count, 1), generator=generator, device=device)
                blocks.append(_continue(model, first, length, generator, bar.update).cpu())
    finally:
        model.train(was_training)
    return torch.cat(blocks)


def _continue(
    model: nn.Module,
    tokens: Tensor,
    length: int,
    generator: torch.Generator,
    progress: Callable[[int], Any],
) -> Tensor:
    """Sample until tokens [B, P] have become [B, length]."""
    sampled, cache = [tokens], None
    for _ in range(length - tokens.shape[1]):
        with autocast(model):
            output = model(input_ids=sampled[-1], past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        logits = output.logits[:, -1].float()
        # Checked once: on a GPU every look waits for the device.
        if len(sampled) == 1 and not torch.isfinite(logits).all():
            raise ProxsparseError("calibration 'self': the model's logits are not finite")
        if cache is None:
            raise ProxsparseError(
                f"calibration 'self': {type(model).__name__} keeps no key-value cache; give a text"
            )
        sampled.append(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        progress(tokens.shape[0])
    return torch.cat(sampled, dim=1)
