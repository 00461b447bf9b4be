"""Tables of text: JSON lines, CSV, TSV and Parquet, and which of their columns is the text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proxsparse.data.chat import is_conversation
from proxsparse.data.compressed import check_unpacked
from proxsparse.errors import ProxsparseError

TABLE_SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".parquet"}
_TEXT_COLUMNS = ("text", "content", "document", "article", "raw_content", "code")
_CHAT_COLUMNS = ("messages", "conversations")
_ROWS_AT_ONCE = 32  # of Parquet, whose dictionaries may stand for far longer text
_LONGEST_FIELD = 2**31 - 1  # of CSV; the module's own limit is 128 KiB


def read_table(text: str, suffix: str, path: Path, wanted: str | None) -> list[Any]:
    """The text column of a table of text: strings, None where a value is missing, or conversations.

    Args:
        text: the file.
        suffix: the format, one of `TABLE_SUFFIXES` but Parquet.
        path: the file's name, for errors.
        wanted: the column; None finds it.

    Raises:
        ProxsparseError: damaged, or no column that is clearly the text.
    """
    rows = (
        _json_rows(text, path) if suffix in (".json", ".jsonl") else _csv_rows(text, suffix, path)
    )
    return _choose(list(rows), wanted, str(path))


def _json_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(): JSON strings may hold U+2028 and the like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply, or a number too long")
            raise ProxsparseError(
                f"{where} is not JSON ({reason}): each line must be one JSON object"
            ) from error
        if not isinstance(row, dict):
            raise ProxsparseError(f"{where} is no JSON object: each line must be one")
        yield number, row


def _csv_rows(text: str, suffix: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows by the names in the first line; quoted fields may hold line ends."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ",", strict=True
        )
        names: list[str] = next(reader, [])
        if len(set(names)) < len(names):
            raise ProxsparseError(f"{path}, line 1: two columns have one name: {', '.join(names)}")
        for row in reader:
            if len(row) not in (0, len(names)):
                raise ProxsparseError(
                    f"{path}, line {reader.line_num}: {len(row)} fields, but the first line names "
                    f"{len(names)} columns; quote fields that hold the separator"
                )
            if row:
                yield reader.line_num, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise ProxsparseError(f"{path}, line {reader.line_num} is no CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _choose(rows: list[tuple[int, dict[str, Any]]], wanted: str | None, path: str) -> list[Any]:
    """The text of each row, after a look at all of them."""
    if not rows:
        return []
    columns = columns_in([row for _, row in rows])
    column = text_column(columns, wanted, path)
    for number, row in rows:
        if column not in row:
            raise ProxsparseError(
                f"{path}, line {number}: column {column!r} does not exist; its columns are "
                f"{', '.join(row)}"
            )
    return [row[column] for _, row in rows]


def read_parquet(data: bytes, path: Path, wanted: str | None) -> list[Any]:
    """The text column of a Parquet file, as for `read_table`.

    Raises:
        ProxsparseError: damaged, far larger than any text, or no column that is clearly the text.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ProxsparseError(f"{path} needs pyarrow: pip install pyarrow") from error

    try:
        file = parquet.ParquetFile(pa.BufferReader(data))
        columns = {field.name: kind_of(field.type) for field in file.schema_arrow}
        column = text_column(columns, wanted, str(path))
        return _parquet_values(file, column, len(data), path)
    except ProxsparseError:
        raise  # a ValueError too, but it says already what is wrong
    except (OSError, pa.ArrowException, ValueError, KeyError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ProxsparseError(f"{path} is not a readable Parquet file: {reason}") from error


def _parquet_values(file: Any, column: str, packed: int, path: Path) -> list[Any]:
    """The values of one column, read in small batches whose unpacked bytes are counted."""
    groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]
    check_unpacked(sum(chunk.total_uncompressed_size for chunk in chunks), packed, path)
    values: list[Any] = []
    size = 0
    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column]):
        array = batch.column(0)
        array = getattr(array, "dictionary_decode", lambda array=array: array)()
        size += array.nbytes
        check_unpacked(size, packed, path)
        values += (decoded(value, str(path)) for value in array.to_pylist())
    return values


def decoded(value: Any, words: str) -> Any:
    """Bytes as the UTF-8 text that they hold, anything else as it is."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ProxsparseError(
            f"{words}: the text column holds bytes that are not UTF-8 (0x{value[error.start]:02x})"
        ) from error


def kind_of(arrow_type: Any) -> str:
    """What an Arrow type holds: "text" (any of strings), "bytes", "chat" (lists of structs), ""."""
    from pyarrow import types

    if types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    if types.is_string(arrow_type) or types.is_large_string(arrow_type):
        return "text"
    name = str(arrow_type)
    if name in ("string_view", "binary", "large_binary", "binary_view"):
        return "text" if name == "string_view" else "bytes"
    is_list = types.is_list(arrow_type) or types.is_large_list(arrow_type)
    return "chat" if is_list and types.is_struct(arrow_type.value_type) else ""


def columns_in(rows: list[Mapping[str, Any]]) -> dict[str, str]:
    """The kind of each column, see `kind_of`, by all values of the rows."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _kind([row.get(name) for row in rows]) for name in names}


def _kind(values: list[Any]) -> str:
    present = [value for value in values if value is not None]
    # One string is enough: that another row holds a number is that row's error.
    if any(isinstance(value, str) for value in present) or not present:
        return "text"
    if any(isinstance(value, bytes) for value in present):
        return "bytes"
    return "chat" if any(map(is_conversation, present)) else ""


def text_column(columns: Mapping[str, str], wanted: str | None, words: str) -> str:
    """The column that holds the text: the one wanted, one of a known name, or the only one.

    Args:
        columns: the kind of each column, see `kind_of`.
        wanted: the user's choice, if any.
        words: where the columns are, for errors.

    Raises:
        ProxsparseError: names the columns and asks for one.
    """
    if wanted is not None:
        if columns.get(wanted):
            return wanted
        problem = "does not hold text" if wanted in columns else "does not exist"
        raise ProxsparseError(
            f"{words}: column {wanted!r} {problem}; its columns are {_listed(columns)}"
        )
    for name in _TEXT_COLUMNS:
        if columns.get(name) in ("text", "bytes"):
            return name
    for name in _CHAT_COLUMNS:
        if columns.get(name) == "chat":
            return name
    if len(columns) == 1 and set(columns.values()) == {"text"}:
        return next(iter(columns))
    raise ProxsparseError(
        f"{words}: which column holds the text? Name it with --text-column; "
        f"its columns are {_listed(columns)}"
    )


def _listed(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{k} ({v})" if v else str(k) for k, v in columns.items()) or "none"
