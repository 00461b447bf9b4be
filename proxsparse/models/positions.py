"""How many tokens a model can read at once, and the error for more."""

from __future__ import annotations

from typing import Any

from torch import nn

from proxsparse.errors import ProxsparseError

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


def text_config(model: nn.Module | None) -> Any:
    """The model's config, or its text part where it has several; None without a model."""
    config: Any = getattr(model, "config", None)
    return config if config is None else config.get_text_config()


def num_positions(model: nn.Module | None) -> int | None:
    """Positions the model was made for; None where its config sets no limit."""
    config = text_config(model)
    found = (getattr(config, name, None) for name in _NAMES)
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def check_positions(model: nn.Module | None, length: int, what: str, room: str = "") -> None:
    """Refuse more tokens than the model has positions.

    Args:
        model: read for its config only, so a model on the meta device serves.
        length: tokens that it would read at once.
        what: what asks for them, with its value, e.g. "--max-seq-length is 4096".
        room: the way out; default "use at most" and the number of positions.

    Raises:
        ProxsparseError: `length` is more than the positions.
    """
    positions = num_positions(model)
    if positions is not None and length > positions:
        room = room or f"use at most {positions}"
        raise ProxsparseError(f"{what}, but the model has {positions} positions: {room}")
