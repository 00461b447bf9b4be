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
    limit = max(_HARMLESS, _MAX_RATIO * len(data))
    parts, size = [], 0
    try:
        with _open(data, suffix, path) as stream:
            while part := stream.read(_CHUNK):
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise ProxsparseError(
                        f"{path} unpacks to more than {_MAX_RATIO} times its size: that is no "
                        "text; unpack it yourself if it is meant so"
                    )
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        raise ProxsparseError(f"{path} is no readable {suffix} file: {error}") from error
    return b"".join(parts)


def _open(data: bytes, suffix: str, path: Path) -> Any:
    if suffix == ".zst":
        try:
            import pyarrow as pa
        except ImportError as error:
            raise ProxsparseError(f"{path} needs pyarrow: pip install pyarrow") from error
        return pa.CompressedInputStream(pa.BufferReader(data), "zstd")
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[suffix]
    return opener(io.BytesIO(data))
