"""Documents to tokens: exactly what one call of the tokenizer gives, for texts of any length.

A long text is cut where the tokenizer would cut it anyway and its pieces are tokenised in parallel;
each piece is tokenised together with the text before it, and compared, so a cut that would change a
token is not made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from proxsparse.data.windows import WINDOW_CHARACTERS, encode_in_windows
from proxsparse.errors import ProxsparseError
from proxsparse.progress import Progress

_BATCH_CHARACTERS = 1 << 20  # per tokenizer call, which holds about 200 bytes for each
_PIECE_CHARACTERS = 1 << 15  # longer texts are cut, so that all cores work on one text
_CONTEXT_CHARACTERS = 64  # text before a cut that the tokens after it may depend on
# Between two words, or between a line that ends in print and one that begins so, whatever the line
# end and with a blank line between or not: tokenizers break there whatever stands around it.
_CUT = re.compile(
    r"(?<=[^\W\d_])(?= [^\W\d_])"
    r"|(?:(?<=\S\n)|(?<=\S\r\n)|(?<=\S\n\n)|(?<=\S\r\n\r\n))(?=\S)"
)
T = TypeVar("T")
_SURROGATE = re.compile("[\ud800-\udfff]")


def tokenize_text(text: str, tokenizer: Any) -> Tensor:
    """The tokens of a whole text, without special tokens; int64 [T] on CPU.

    The result is that of one call on the whole text. A long text is tokenised in pieces, in
    parallel and in bounded memory: each piece together with the end of the one before, whose
    tokens are then dropped. A cut is made only where the tokens before it do not change with what
    follows (tried with the tokenizer itself). What is left without a cut, such as base64, goes
    through in overlapping windows, which are joined at a token that both have. This is exact for
    tokenizers whose tokens depend on the text nearby, which BPE and Unigram vocabularies are.

    Memory: about 600 bytes for each of `_BATCH_CHARACTERS` characters at most, and 8 bytes for a
    token. A tokenizer without offsets (a slow one), or whose windows never agree, gets a text
    without cuts in one call.

    Raises:
        ProxsparseError: the text holds a lone surrogate, which no tokenizer takes.
    """
    parts: list[Tensor] = []
    with Progress("tokenising", len(text), unit="char") as bar:
        for batch in batches(_pieces(text, tokenizer), lambda piece: len(piece[0])):
            texts, num_context = zip(*batch, strict=True)
            if len(texts) == 1 and len(texts[0]) > WINDOW_CHARACTERS:
                encoded = [_encode_long(texts[0], tokenizer)]
            else:
                encoded = _encode(list(texts), tokenizer)
            parts += [ids[n:] for ids, n in zip(encoded, num_context, strict=True)]
            bar.update(sum(map(len, texts)))
    return torch.cat(parts)


def to_blocks(tokens: Tensor, length: int) -> Tensor:
    """Tokens [T] as blocks [T // length, length]; what remains at the end is dropped."""
    count = tokens.numel() // length
    return tokens[: count * length].reshape(count, length)


def _encode(texts: list[str], tokenizer: Any) -> list[Tensor]:
    encoded = _call(texts, tokenizer)
    return [torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"]]


def _call(texts: list[str], tokenizer: Any, **options: Any) -> Any:
    try:
        return tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options
        )
    except (TypeError, UnicodeEncodeError) as error:
        found = next(filter(None, map(_SURROGATE.search, texts)), None)
        if found is None:
            raise
        raise ProxsparseError(
            f"the text is not valid Unicode: it holds the lone surrogate {found.group()!r}; "
            "replace it, e.g. with text.encode(errors='replace').decode()"
        ) from error


def _encode_long(text: str, tokenizer: Any) -> Tensor:
    """The tokens of a text without cuts; a tokenizer without offsets gets it in one call."""
    if not getattr(tokenizer, "is_fast", False):
        return _encode([text], tokenizer)[0]

    def encode(begin: int, end: int) -> tuple[list[int], list[int]]:
        encoded = _call([text[begin:end]], tokenizer, return_offsets_mapping=True)
        starts = [begin + start for start, _ in encoded["offset_mapping"][0]]
        return encoded["input_ids"][0], starts

    return torch.tensor(encode_in_windows(encode, len(text)), dtype=torch.int64)


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
    for batch in batches(documents, len):
        if len(batch) == 1:
            encoded = [tokenize_text(batch[0], tokenizer)]
        else:
            encoded = _encode(batch, tokenizer)
        for ids in encoded:
            yield ids if is_first else torch.cat((between, ids))
            is_first = False


def batches(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in lists of at most `_BATCH_CHARACTERS`; a long one stands alone."""
    batch: list[T] = []
    total = 0
    for item in items:
        size = size_of(item)
        if batch and (total + size > _BATCH_CHARACTERS or size > WINDOW_CHARACTERS):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
        if size > WINDOW_CHARACTERS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def added_prefix(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer itself puts before a text, which its model has always seen.

    Mostly the beginning-of-text token (BOS); none for a tokenizer that adds nothing. One that has
    `add_bos_token` set puts its BOS there, whether its own template does so or not.
    """
    if tokenizer is None:
        return []
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    begins = range(len(whole) - len(plain) + 1)
    begin = next((i for i in begins if whole[i : i + len(plain)] == plain), 0)
    bos = getattr(tokenizer, "bos_token_id", None)
    if not begin and bos is not None and getattr(tokenizer, "add_bos_token", False) is True:
        return [bos]
    return list(whole[:begin])


def check_room(prefix: list[int], length: int) -> None:
    """Refuse blocks of `length` tokens that the prefix alone would fill.

    Raises:
        ProxsparseError: `length` leaves no room for text.
    """
    if length <= len(prefix):
        raise ProxsparseError(
            f"--max-seq-length is {length}, but the tokenizer puts {len(prefix)} tokens before "
            f"each block: use at least {len(prefix) + 1}"
        )


def with_prefix(tokens: Tensor, prefix: list[int], length: int) -> Tensor:
    """Tokens [T] as blocks [S, length], each of which begins with `prefix`.

    The prefix counts: a block holds length - len(prefix) tokens of the text, and the model never
    sees more than `length`.

    Raises:
        ProxsparseError: `length` leaves no room for text.
    """
    check_room(prefix, length)
    blocks = to_blocks(tokens, length - len(prefix))
    before = torch.tensor(prefix, dtype=torch.int64).expand(len(blocks), -1)
    return torch.cat((before, blocks), 1)
