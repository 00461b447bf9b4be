"""From text of any origin to the blocks of tokens that masks are learned on.

Every source becomes documents; documents become one run of tokens, with the end-of-text token
between them; the run is cut into blocks of one length, and blocks are drawn without replacement.
Nothing is padded or repeated: too little text is an error, because a mask learned on repeated
blocks looks better in training than it is.

A source that is in memory or on disk is read whole, so that every part of it can be drawn. A source
that streams (the Hub, a generator, a DataLoader) is read until it has given twice what is needed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from proxsparse.config import CalibrationConfig
from proxsparse.data.self_sampling import sample_texts
from proxsparse.data.sources import only_text, open_source, refuse_unused
from proxsparse.data.tokenizing import added_prefix, tokenize_documents, with_prefix
from proxsparse.errors import ProxsparseError
from proxsparse.models.positions import check_positions, text_config
from proxsparse.progress import Progress

_STREAM_SLACK = 2  # a stream is read until it gave this many times the tokens needed
_HELD_OUT_TOKENS = 16384  # at most, and one block at least; some seconds of a forward pass


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Calibration tokens and where they came from.

    Attributes:
        tokens: int64 [S, L] blocks on CPU, in the order drawn.
        source: the origin in words.
        num_tokens: S * L, all of them real tokens.
        num_available_tokens: tokens read from the source, out of which the blocks were drawn.
        fingerprint: SHA-256 of `tokens` as little-endian int64, in hex.
        prefix: the tokens that begin each block because the tokenizer puts them before every text;
            they count in `tokens`, and not in `num_available_tokens`.
        held_out: int64 [H, L] blocks of the same source that are not among `tokens`, to measure
            on; None where there are none left.
    """

    tokens: Tensor
    source: str
    num_tokens: int
    num_available_tokens: int
    fingerprint: str
    prefix: tuple[str, ...] = ()
    held_out: Tensor | None = None


def load_calibration(
    source: Any,
    tokenizer: Any,
    config: CalibrationConfig,
    num_samples: int,
    model: nn.Module | None = None,
) -> Calibration:
    """Draw `num_samples` blocks of `config.max_seq_length` tokens from a source.

    Documents are joined with the tokenizer's end-of-text token, if it has one, and blank ones are
    left out. What the tokenizer itself puts before a text (mostly BOS) begins each block and counts
    in its length; no other special tokens are added, and none to token ids. Deterministic for a
    seed.

    Args:
        source: one of
            - "stdlib" or "self" (a folder of that name is "./stdlib");
            - a path: a file of text or a table (JSON lines, CSV, TSV, Parquet), perhaps compressed
              (.gz, .bz2, .xz, .zst), or a folder of them, read recursively in sorted
              order without hidden entries (names that begin with a dot);
            - "c4", "wikitext2", "org/name" or "org/name:config" on the Hub, unless a file or folder
              has that name;
            - an iterable of texts, a `datasets.Dataset` or `IterableDataset`;
            - token ids: an integer tensor, or an iterable, such as a DataLoader, of integer tensors
              [B, T] or of dicts with "input_ids" and perhaps "attention_mask" (masked tokens are
              left out). Rows follow one another without a separator.
        tokenizer: the model's tokenizer; not needed for token ids or "self".
        config: split, text column, block length and seed. `config.calibration` is not read: the
            caller resolves it into `source`.
        num_samples: blocks to draw.
        model: the model the tokens are for, on its device. "self" needs it; otherwise it serves to
            check the block length against its positions and the ids against its vocabulary.

    Raises:
        ProxsparseError: source unknown, unreadable, blank or not text; too little text; no text
            column; settings the source has no use for; a Hub that cannot be reached; a block longer
            than the model's positions; ids outside its vocabulary.
    """
    assert config.max_seq_length is not None
    length, needed = config.max_seq_length, num_samples * config.max_seq_length
    if num_samples < 1:
        raise ProxsparseError(f"num_samples is {num_samples}: at least 1 block must be drawn")
    check_positions(model, length, f"--max-seq-length is {length}")
    if isinstance(source, str) and source == "self":
        words = "sampled from the model itself"
        refuse_unused(config, words, "split", "text_column")
        blocks = sample_texts(model, tokenizer, num_samples, length, config.seed)
        return _calibration(blocks, words, blocks.numel(), tokenizer, added_prefix(tokenizer))

    prefix: list[int] = []
    text = open_source(source, config)
    first, documents = _peek(text.documents)
    limit = _STREAM_SLACK * needed if text.is_stream else None
    if isinstance(first, Tensor | Mapping):
        refuse_unused(config, text.source, "split", "text_column")
        tokens = _concatenate(map(_ids, documents), limit)
    else:
        if tokenizer is None:
            raise ProxsparseError(f"calibrating on {text.source} needs the model's tokenizer")
        prefix = added_prefix(tokenizer)
        separator = None if text.is_one_document else getattr(tokenizer, "eos_token_id", None)
        documents = only_text(documents, text.source, tokenizer)
        tokens = _concatenate(tokenize_documents(documents, tokenizer, separator), limit)
    if tokens.numel() == 0:
        raise ProxsparseError(f"{text.source} holds no text: there is nothing to calibrate on")
    _check_ids(tokens, model)
    blocks = with_prefix(tokens, prefix, length)
    if blocks.shape[0] == 0:
        raise ProxsparseError(
            f"{text.source} has {tokens.numel():,} tokens, less than one sequence of {length:,}: "
            "give more text or a smaller --max-seq-length"
        )
    if blocks.shape[0] < num_samples:
        raise ProxsparseError(
            f"{num_samples:,} samples of {length:,} tokens were asked for, which is {needed:,} "
            f"tokens, but {text.source} has {tokens.numel():,} ({blocks.shape[0]:,} samples): give "
            "more text or, to a learned method, fewer --tokens; or let blocks be seen again with "
            f"--num-calibration-samples {blocks.shape[0]}"
        )
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(blocks.shape[0], generator=generator)
    drawn, others = order[:num_samples], order[num_samples:]
    others = others[: max(1, _HELD_OUT_TOKENS // length)]
    found = _calibration(blocks[drawn], text.source, tokens.numel(), tokenizer, prefix)
    return dataclasses.replace(found, held_out=blocks[others] if len(others) else None)


def _calibration(
    blocks: Tensor, source: str, num_available_tokens: int, tokenizer: Any, prefix: list[int]
) -> Calibration:
    data = blocks.numpy().astype("<i8").tobytes()
    digest = hashlib.sha256(data).hexdigest()
    names = tuple(tokenizer.convert_ids_to_tokens(prefix)) if prefix else ()
    return Calibration(blocks, source, blocks.numel(), num_available_tokens, digest, names)


def _concatenate(parts: Iterable[Tensor], limit: int | None) -> Tensor:
    """All parts in one tensor [T]; reads no further once `limit` tokens are there."""
    kept, total = [torch.empty(0, dtype=torch.int64)], 0
    with Progress("calibration text", unit="token") as bar:
        for part in parts:
            kept.append(part)
            total += part.numel()
            bar.update(part.numel())
            if limit is not None and total >= limit:
                break
    return torch.cat(kept)


def _check_ids(tokens: Tensor, model: nn.Module | None) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    size = getattr(text_config(model), "vocab_size", None)
    if low < 0:
        raise ProxsparseError(
            f"token id {low} is negative: padding must be left out with an attention_mask"
        )
    if size is not None and high >= size:
        raise ProxsparseError(
            f"token id {high} is outside the model's vocabulary of {size}: the tokens come from "
            "another model's tokenizer; use the one saved with this model"
        )


def _peek(items: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """The first item (None without one), and an iterator over all of them."""
    iterator = iter(items)
    head = list(itertools.islice(iterator, 1))
    return (head[0] if head else None), itertools.chain(head, iterator)


def _ids(batch: Any) -> Tensor:
    """The token ids of a batch, row after row without what its mask hides; int64 [T] on CPU."""
    ids, mask = batch, None
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise ProxsparseError(
                f"a calibration batch has the keys {', '.join(map(str, batch))}, but no 'input_ids'"
            )
        ids, mask = batch["input_ids"], batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        kind = f"{ids.dtype} tensor" if isinstance(ids, Tensor) else type(ids).__name__
        raise ProxsparseError(
            f"a calibration batch holds a {kind}: token ids must be an integer tensor [B, T]"
        )
    if mask is not None:
        mask = torch.as_tensor(mask, device=ids.device)
        if mask.shape != ids.shape:
            raise ProxsparseError(
                f"attention_mask is {list(mask.shape)}, but input_ids is {list(ids.shape)}"
            )
        ids = ids[mask.bool()]
    return ids.detach().flatten().to("cpu", torch.int64)
