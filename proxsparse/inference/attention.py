"""Attention of one position, with grouped queries and nothing repeated.

What is left of a decode step beside its weights is mostly attention: transformers repeats keys and
values for the query heads that share them, whole cache and in every layer. A step does without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_STEP_ATTENTION = "proxsparse_step"  # what transformers knows `_grouped_attention` by
# Given to attention functions and of no use to `sdpa`: the mask has what is in them.
_FOR_OTHER_ATTENTION = frozenset({"cache_position", "position_ids", "sliding_window", "use_cache"})


def _grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' `sdpa` attention, which for one position repeats no keys and values.

    The H / Hkv query heads that share a head of keys and values become so many positions of one
    head, which attend to the same places. What else `sdpa` takes is left to it.

    Args:
        module: the attention layer.
        query: [B, H, 1, D].
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        attention_mask: bool or added, [B or 1, 1, 1, S], or None.
        dropout: 0, else it is left to `sdpa`.
        scaling: of the scores; D ** -0.5 unless given.
        **kwargs: those that `sdpa` does not look at, else it is left to it.

    Returns:
        [B, 1, H, Dv] and no attention weights, as transformers wants it.

    Cost: memory-bound; reads keys and values once.
    """
    batch_size, heads, length, _ = query.shape
    kv_heads, places = key.shape[1:3]
    is_plain = all(
        x is None or x is False or name in _FOR_OTHER_ATTENTION for name, x in kwargs.items()
    )
    has_plain_mask = attention_mask is None or (
        attention_mask.dim() == 4 and attention_mask.shape[1:] == (1, 1, places)
    )
    is_grouped = length == 1 and heads > kv_heads and heads % kv_heads == 0
    if not (is_grouped and is_plain and has_plain_mask and dropout == 0):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    attended = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(batch_size, kv_heads, heads // kv_heads, -1),
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return attended.reshape(batch_size, 1, heads, -1), None


def configs_to_regroup(model: Any) -> list[Any]:
    """The configs by which the model's layers find their attention; none if it cannot be ours.

    One that holds others comes before them. It cannot be ours in a model that does not look its
    attention function up, and where somebody has put another one in the place of "sdpa".
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError:  # no such interface; "sdpa" itself gives the same
        return []
    if not getattr(model, "_supports_attention_backend", False):
        return []
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        return []
    AttentionInterface.register(_STEP_ATTENTION, _grouped_attention)
    AttentionMaskInterface.register(_STEP_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if hasattr(config, "_attn_implementation") and id(config) not in found:
            found[id(config)] = config
            for name in getattr(config, "sub_configs", {}):
                add(getattr(config, name, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


@contextlib.contextmanager
def regrouped(configs: list[Any]) -> Iterator[None]:
    """Let `_grouped_attention` stand for "sdpa" in these configs, whatever happens meanwhile."""
    before = [config._attn_implementation for config in configs]
    try:
        for config, name in zip(configs, before, strict=True):
            # Others are set too, to what they were: a config sets those that it holds.
            config._attn_implementation = _STEP_ATTENTION if name == "sdpa" else name
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
