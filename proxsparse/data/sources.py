"""Where calibration text comes from: files, folders, the Hub, and what is in memory already.

Each source is opened as one thing (`_Text`): a name for reports, a stream of documents, and whether
all of it must be read, so that what draws blocks need not know where text came from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from proxsparse.config import CalibrationConfig
from proxsparse.data.chat import is_conversation, render
from proxsparse.data.compressed import COMPRESSED_SUFFIXES, unpack
from proxsparse.data.tables import (
    TABLE_SUFFIXES,
    columns_in,
    decoded,
    kind_of,
    read_parquet,
    read_table,
    text_column,
)
from proxsparse.data.tokenizing import batches
from proxsparse.errors import ProxsparseError

_HUB_ALIASES = {"c4": "allenai/c4:en", "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1"}
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[^/\\]+)?")
_ROWS_ARE_LINES = ("Salesforce/wikitext",)  # a row is a line with its line end, not a document
_FILE_SUFFIXES = {".txt", ".md", ".rst", ".py"} | TABLE_SUFFIXES | COMPRESSED_SUFFIXES
_ROWS_TO_JUDGE = 64  # of a stream, whose columns have no declared types
_MAX_LISTED = 10  # files named in one error
_OFFLINE = (
    "Without a network, calibrate on a local file or folder, on 'stdlib' (Python's own standard "
    "library) or on 'self' (sampled from the model)"
)


@dataclasses.dataclass(frozen=True)
class _Text:
    """An opened source of text: its documents, its name in words, and how to read it."""

    documents: Iterable[Any]
    source: str
    is_stream: bool = False
    is_one_document: bool = False  # the documents are its parts: nothing goes between them


def read_text(path: str | os.PathLike[str]) -> str:
    """The content of one text file: UTF-8, line ends as they are, a byte order mark removed.

    Raises:
        ProxsparseError: no such file, a folder, unreadable, not UTF-8, holding NUL bytes, or blank.
    """
    text = _decode(Path(path))
    if not text or text.isspace():
        raise ProxsparseError(f"{path} is {'blank' if text else 'empty'}: it holds no text")
    return text


def _decode(path: Path) -> str:
    data = unpack(_read_bytes(path), path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProxsparseError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}): give a "
            f"text file, or convert it to UTF-8; tables ({', '.join(sorted(TABLE_SUFFIXES))}) and "
            f"compressed files ({', '.join(sorted(COMPRESSED_SUFFIXES))}) are known by their names"
        ) from error
    if "\0" in text:
        raise ProxsparseError(f"{path} holds NUL bytes, so it is not a text file")
    return text


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "is no file"
        if not path.exists():
            state = "does not exist"
        raise ProxsparseError(f"{path} {state}: give the path of a text file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProxsparseError(f"{path} cannot be read: {error.strerror}") from error


def _format(path: Path) -> str:
    """The suffix that says what a file holds, without that of its compression."""
    is_compressed = path.suffix.lower() in COMPRESSED_SUFFIXES
    return (path.with_suffix("") if is_compressed else path).suffix.lower()


def read_documents(
    source: str | os.PathLike[str],
    tokenizer: Any,
    wanted: str | None = None,
    *,
    split: str | None = None,
    most_characters: int | None = None,
) -> list[str]:
    """The documents of a file, a folder or a dataset on the Hub, without blank ones.

    Args:
        source: a path, or a name as for calibration.
        tokenizer: renders conversations.
        wanted: the column of a table that holds the text.
        split: of a dataset on the Hub.
        most_characters: where to stop reading what streams.

    Raises:
        ProxsparseError: there is none, it cannot be read, or it holds no text.
    """
    name = source if isinstance(source, str) else Path(source)
    text = open_source(name, CalibrationConfig(text_column=wanted, split=split))
    documents, size = [], 0
    for document in only_text(text.documents, text.source, tokenizer):
        documents.append(document)
        size += len(document)
        if text.is_stream and most_characters is not None and size >= most_characters:
            break
    if not documents:
        raise ProxsparseError(f"{source} is empty or blank: it holds no text")
    return ["".join(documents)] if text.is_one_document else documents


def open_source(source: Any, config: CalibrationConfig) -> _Text:
    """The text of a calibration source, opened but not yet read.

    Args:
        source: a path, a name (see `CalibrationConfig`), texts, or a data set.
        config: the settings; those that a source of this kind cannot use are refused.

    Raises:
        ProxsparseError: the source does not exist, cannot be read, or holds no text.
    """
    if isinstance(source, str | os.PathLike):
        return _open_name(os.fspath(source), config, is_path=not isinstance(source, str))
    if isinstance(source, Tensor):
        return _Text([source], "token ids")
    datasets = sys.modules.get("datasets")  # whoever holds a dataset has imported it
    if datasets and isinstance(source, datasets.Dataset | datasets.IterableDataset):
        words = f"a {type(source).__name__}"
        refuse_unused(config, words, "split")
        is_stream = isinstance(source, datasets.IterableDataset)
        return _Text(_rows(source, config.text_column, words), words, is_stream)
    if isinstance(source, Mapping):
        raise ProxsparseError(
            f"calibration is a {type(source).__name__} with the keys "
            f"{', '.join(map(str, source))}: pass one of its values"
        )
    if isinstance(source, bytes | bytearray) or not isinstance(source, Iterable):
        raise ProxsparseError(
            f"calibration is a {type(source).__name__}: pass a path or name, a list of texts, a "
            "datasets.Dataset or batches of token ids"
        )
    refuse_unused(config, f"a {type(source).__name__}", "split", "text_column")
    if isinstance(source, Sequence):
        return _Text(source, f"a {type(source).__name__} of length {len(source):,}")
    return _Text(source, f"a {type(source).__name__}", is_stream=True)


def _open_name(name: str, config: CalibrationConfig, is_path: bool) -> _Text:
    if name == "stdlib" and not is_path:
        from proxsparse.data.corpus import stdlib_texts

        words = f"the standard library of Python {sys.version_info.major}.{sys.version_info.minor}"
        refuse_unused(config, words, "split", "text_column")
        return _Text([text for _, text in stdlib_texts("train")], words)
    # os.path, because pathlib raises on a name that is too long, such as a text passed as a name.
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        return _open_folder(path, config)
    if name and os.path.exists(path):
        refuse_unused(config, str(path), "split")
        documents = _read_file(path, config.text_column)
        is_table = _format(path) in TABLE_SUFFIXES
        if not is_table:
            refuse_unused(config, str(path), "text_column")
        return _Text(documents, str(path), is_one_document=not is_table)
    hub_name = _HUB_ALIASES.get(name, name)
    if is_path or path.suffix.lower() in _FILE_SUFFIXES or not _HUB_NAME.fullmatch(hub_name):
        raise ProxsparseError(
            f"calibration {name[:100]!r}: there is no such file or folder, and it is not the name "
            "of a dataset ('stdlib', 'self', 'c4', 'wikitext2', or 'org/name' on the Hub); a text "
            "itself goes into a list"
        )
    return _open_hub(hub_name, config)


def _open_folder(folder: Path, config: CalibrationConfig) -> _Text:
    refuse_unused(config, str(folder), "split")
    files = sorted(_files_in(folder))
    if not files:
        raise ProxsparseError(f"{folder} holds no files (hidden ones are not read)")
    if not any(_format(path) in TABLE_SUFFIXES for path in files):
        refuse_unused(config, str(folder), "text_column")
    documents: list[Any] = []
    problems = []
    for path in files:
        try:
            documents.extend(_read_file(path, config.text_column))
        except ProxsparseError as error:
            problems.append(str(error))
    if problems:
        listed = problems[:_MAX_LISTED]
        if len(problems) > _MAX_LISTED:
            listed.append(f"and {len(problems) - _MAX_LISTED:,} more")
        raise ProxsparseError(
            f"{len(problems):,} of the {len(files):,} files in {folder} cannot be used; move them "
            "out of it:\n  " + "\n  ".join(listed)
        )
    return _Text(documents, f"{folder} ({len(files):,} files)")


def _files_in(folder: Path) -> Iterator[Path]:
    """All files below `folder` but hidden ones; a link to a folder counts as a (useless) file."""

    def fail(error: OSError) -> None:
        raise ProxsparseError(f"{error.filename} cannot be read: {error.strerror}")

    for directory, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if Path(directory, name).is_symlink()]
        yield from (Path(directory, name) for name in (*names, *links) if name[0] != ".")


def _read_file(path: Path, wanted: str | None) -> list[Any]:
    """The documents of one file, chosen by its suffix: the rows of a table, or the text as one."""
    suffix = _format(path)
    if suffix == ".parquet":
        return read_parquet(unpack(_read_bytes(path), path), path, wanted)
    text = _decode(path)
    return read_table(text, suffix, path, wanted) if suffix in TABLE_SUFFIXES else [text]


def _open_hub(name: str, config: CalibrationConfig) -> _Text:
    """Rows of a dataset on the Hub, streamed."""
    repository, _, subset = name.partition(":")
    split = config.split or "train"
    words = f"{repository} ({f'{subset}, ' if subset else ''}{split})"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ProxsparseError(
            f"{words} needs the datasets package: pip install datasets. {_OFFLINE}"
        ) from error
    with _explaining_failure(words):
        dataset = load_dataset(repository, subset or None, split=split, streaming=True)
        rows = _rows(dataset, config.text_column, words)
    if repository in _ROWS_ARE_LINES:
        lines = (row or " \n" for row in rows)  # the Hub's copy has blank lines as empty rows
        parts = map("".join, batches(lines, len))
        return _Text(parts, words, is_stream=True, is_one_document=True)
    return _Text(rows, words, is_stream=True)


@contextlib.contextmanager
def _explaining_failure(words: str) -> Iterator[None]:
    """Turn what a download raises (dozens of types, none of them promised) into one error."""
    try:
        yield
    except ProxsparseError:
        raise
    except Exception as error:
        raise ProxsparseError(
            f"the dataset {words} cannot be read: {type(error).__name__}: {error}. Check its name, "
            f"config and --split, and the network. {_OFFLINE}"
        ) from error


def _rows(dataset: Any, wanted: str | None, words: str) -> Iterator[Any]:
    """The text column of a `datasets` dataset, checked at once; its rows, read lazily."""
    features = dataset.features  # None for a stream that has not been looked into
    if features is None:
        columns = columns_in(list(itertools.islice(dataset, _ROWS_TO_JUDGE)))
    else:
        columns = {field.name: kind_of(field.type) for field in features.arrow_schema}
    column = text_column(columns, wanted, words)

    def read() -> Iterator[Any]:
        with _explaining_failure(words):
            for row in dataset.select_columns(column):
                yield decoded(row[column], words)

    return read()


def refuse_unused(config: CalibrationConfig, words: str, *fields: str) -> None:
    """An option that would change nothing is a misunderstanding: say so."""
    for name in fields:
        value = getattr(config, name)
        if value is not None:
            flag = "--" + name.replace("_", "-")
            raise ProxsparseError(f"{flag} is {value!r}, but {words} has none: leave it out")


def only_text(documents: Iterable[Any], words: str, tokenizer: Any) -> Iterator[str]:
    """The documents that say something; conversations are rendered, and None counts as blank."""
    for index, document in enumerate(documents):
        if document is None or (isinstance(document, list) and not document):
            continue  # missing, or a conversation in which nobody speaks
        if is_conversation(document):
            document = render(document, tokenizer, f"{words}, item {index}")
        if not isinstance(document, str):
            raise ProxsparseError(f"{words}: item {index} is a {type(document).__name__}, not text")
        if document and not document.isspace():
            yield document
