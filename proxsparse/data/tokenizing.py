"""Documents to tokens: exactly what one call of the tokenizer gives, for texts of any length.

A long text is cut where the tokenizer would cut it anyway and its pieces are tokenised in parallel;
each piece is tokenised together with the text before it, and compared, so a cut that would change a
token is not made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from proxsparse.errors import ProxsparseError

_BATCH_CHARACTERS = 1 << 20  # per tokenizer call, which holds about 200 bytes for each
_PIECE_CHARACTERS = 1 << 15  # longer texts are cut, so that all cores work on one text
_PIECES_PER_CALL = _BATCH_CHARACTERS // _PIECE_CHARACTERS
_CONTEXT_CHARACTERS = 64  # text before a cut that the tokens after it may depend on
# Between two words, or between a line that ends in print and one that begins so: tokenizers break
# there whatever stands around it.
_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=\S)")
_SURROGATE = re.compile("[\ud800-\udfff]")


def tokenize_text(text: str, tokenizer: Any) -> Tensor:
    """The tokens of a whole text, without special tokens; int64 [T] on CPU.

    The result is that of one call on the whole text. A long text is tokenised in pieces, in
    parallel and in bounded memory: each piece together with the end of the one before, whose
    tokens are then dropped. A cut is made only where the tokens before it do not change with what
    follows (tried with the tokenizer itself), so a tokenizer that no cut suits gets the text in one
    call. This is exact for tokenizers that split text into words first, such as byte-level BPE, and
    for SentencePiece vocabularies without tokens across a space.

    Raises:
        ProxsparseError: the text holds a lone surrogate, which no tokenizer takes.
    """
    pieces = _pieces(text, tokenizer)
    parts: list[Tensor] = []
    with tqdm(total=len(text), desc="tokenising", unit="char", disable=None, leave=False) as bar:
        for i in range(0, len(pieces), _PIECES_PER_CALL):
            texts, num_context = zip(*pieces[i : i + _PIECES_PER_CALL], strict=True)
            encoded = _encode(list(texts), tokenizer)
            parts += [ids[n:] for ids, n in zip(encoded, num_context, strict=True)]
            bar.update(sum(map(len, texts)))
    return torch.cat(parts)


def to_blocks(tokens: Tensor, length: int) -> Tensor:
    """Tokens [T] as blocks [T // length, length]; what remains at the end is dropped."""
    count = tokens.numel() // length
    return tokens[: count * length].reshape(count, length)


def _encode(texts: list[str], tokenizer: Any) -> list[Tensor]:
    try:
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
    except (TypeError, UnicodeEncodeError) as error:
        found = next(filter(None, map(_SURROGATE.search, texts)), None)
        if found is None:
            raise
        raise ProxsparseError(
            f"the text is not valid Unicode: it holds the lone surrogate {found.group()!r}; "
            "replace it, e.g. with text.encode(errors='replace').decode()"
        ) from error
    return [torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"]]


def _pieces(text: str, tokenizer: Any) -> list[tuple[str, int]]:
    """Pieces to tokenise, each with its context before it, and that context's number of tokens."""
    cuts = []
    match = _CUT.search(text, _PIECE_CHARACTERS)
    while match:
        cuts.append(match.start())
        match = _CUT.search(text, match.start() + _PIECE_CHARACTERS)
    if not cuts:
        return [(text, 0)]
    begins = [cut - _CONTEXT_CHARACTERS for cut in cuts]
    ends = [cut + _CONTEXT_CHARACTERS for cut in cuts]
    before = _encode([text[a:cut] for a, cut in zip(begins, cuts, strict=True)], tokenizer)
    across = _encode([text[a:b] for a, b in zip(begins, ends, strict=True)], tokenizer)
    pieces, begin, num_context = [], 0, 0
    for a, cut, left, both in zip(begins, cuts, before, across, strict=True):
        if torch.equal(both[: left.numel()], left):
            pieces.append((text[begin:cut], num_context))
            begin, num_context = a, left.numel()
    pieces.append((text[begin:], num_context))
    return pieces


def tokenize_documents(
    documents: Iterable[str], tokenizer: Any, separator: int | None
) -> Iterator[Tensor]:
    """The tokens of each document, with `separator` between documents."""
    between = torch.tensor([] if separator is None else [separator], dtype=torch.int64)
    is_first = True
    for batch in batches(documents):
        if len(batch) == 1:
            encoded = [tokenize_text(batch[0], tokenizer)]
        else:
            encoded = _encode(batch, tokenizer)
        for ids in encoded:
            yield ids if is_first else torch.cat((between, ids))
            is_first = False


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of at most `_BATCH_CHARACTERS`; a longer one stands alone."""
    batch: list[str] = []
    size = 0
    for document in documents:
        if batch and size + len(document) > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document)
    if batch:
        yield batch
