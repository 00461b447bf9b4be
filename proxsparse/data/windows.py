"""Tokens of a text that cannot be cut, such as base64, in overlapping windows.

A tokenizer holds hundreds of bytes for each character of a call, so that one call on a long text
takes gigabytes. Tokens depend on the text nearby only: two windows that overlap agree in the middle
of what they share, and are joined there.
"""

from __future__ import annotations

from collections.abc import Callable

WINDOW_CHARACTERS = 1 << 17
_OVERLAP = 32  # a window shares this part of its characters with the next one
_MIN_AGREEING = 8  # tokens in a row that show two windows to be in step

Encode = Callable[[int, int], tuple[list[int], list[int]]]


def encode_in_windows(encode: Encode, length: int, size: int = 0) -> list[int]:
    """The tokens of a whole text, out of calls on parts of it.

    A window begins at a token of the one before, so that digits in groups and runs of one character
    stay in step. Windows are joined at a token from which both agree, up to the last part of the
    first window, where tokens change with what follows. Windows that nowhere agree are too small
    for this tokenizer: all begins again with twice the size, at last with the whole text at once.

    Args:
        encode: gives the ids of text[begin:end] and where in the text each begins.
        length: characters of the text.
        size: characters of a window; default `WINDOW_CHARACTERS`.
    """
    size = size or WINDOW_CHARACTERS
    overlap = size // _OVERLAP
    kept: list[int] = []
    end = min(size, length)
    ids, starts = encode(0, end)
    while end < length:
        begin = next((start for start in starts if start >= end - overlap), 0)
        if begin == 0:  # one token, or none, for all that is shared
            return encode_in_windows(encode, length, 2 * size)
        next_end = min(begin + size, length)
        next_ids, next_starts = encode(begin, next_end)
        joint = _joint(ids, starts, next_ids, next_starts, end - overlap // 2)
        if joint is None:
            return encode_in_windows(encode, length, 2 * size)
        left, right = joint
        kept += ids[:left]
        ids, starts, end = next_ids[right:], next_starts[right:], next_end
    return kept + ids


def _joint(
    ids: list[int], starts: list[int], next_ids: list[int], next_starts: list[int], sure: int
) -> tuple[int, int] | None:
    """The first tokens of two windows from which both are equal up to character `sure`, if any."""
    left = sum(start < sure for start in starts)
    right = sum(start < sure for start in next_starts)
    agreeing = 0
    while agreeing < min(left, right):
        i, j = left - agreeing - 1, right - agreeing - 1
        if (ids[i], starts[i]) != (next_ids[j], next_starts[j]):
            break
        agreeing += 1
    # Several tokens of one character begin at one place: a joint is at the first of them.
    while agreeing and _is_inside(starts, left - agreeing):
        agreeing -= 1
    return None if agreeing < _MIN_AGREEING else (left - agreeing, right - agreeing)


def _is_inside(starts: list[int], index: int) -> bool:
    return index > 0 and starts[index] == starts[index - 1]
