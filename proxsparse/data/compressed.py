"""Compressed files, unpacked in memory and within bounds."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import Any

from proxsparse.errors import ProxsparseError

COMPRESSED_SUFFIXES = {".gz", ".bz2", ".xz", ".zst"}
_CHUNK = 1 << 20
_HARMLESS = 64 << 20  # bytes that any file may unpack to
_MAX_RATIO = 200  # no text compresses so well, but a file made to fill the memory does


def unpack(data: bytes, path: Path) -> bytes:
    """The content of a compressed file; a file with another suffix comes back as it is.

    Raises:
        ProxsparseError: damaged, or far larger than any text would be.
    """
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED_SUFFIXES:
        return data
    parts, size = [], 0
    try:
        with _open(data, suffix, path) as stream:
            while part := stream.read(_CHUNK):
                parts.append(part)
                size += len(part)
                check_unpacked(size, len(data), path)
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        raise ProxsparseError(f"{path} is no readable {suffix} file: {error}") from error
    return b"".join(parts)


def check_unpacked(size: int, packed: int, path: Path) -> None:
    """Refuse a file of `packed` bytes that has given `size` bytes, far more than any text would.

    Raises:
        ProxsparseError: more than `_MAX_RATIO` times its size, and more than `_HARMLESS` bytes.
    """
    if size > max(_HARMLESS, _MAX_RATIO * packed):
        raise ProxsparseError(
            f"{path} unpacks to more than {_MAX_RATIO} times its size: that is no text; unpack it "
            "yourself if it is meant so"
        )


def _open(data: bytes, suffix: str, path: Path) -> Any:
    if suffix == ".zst":
        try:
            import pyarrow as pa
        except ImportError as error:
            raise ProxsparseError(f"{path} needs pyarrow: pip install pyarrow") from error
        return pa.CompressedInputStream(pa.BufferReader(data), "zstd")
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[suffix]
    return opener(io.BytesIO(data))
