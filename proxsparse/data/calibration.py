"""From text of any origin to the blocks of tokens that masks are learned on.

Every source becomes documents; documents become one run of tokens, with the end-of-text token
between them; the run is cut into blocks of one length, and blocks are drawn without replacement.
Nothing is padded or repeated: too little text is an error, because a mask learned on repeated
blocks looks better in training than it is.

A source that is in memory or on disk is read whole, so that every part of it can be drawn. A source
that streams (the Hub, a generator, a DataLoader) is read until it has given twice what is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from proxsparse.config import CalibrationConfig
from proxsparse.errors import ProxsparseError
from proxsparse.models.precision import autocast

_STREAM_SLACK = 2  # a stream is read until it gave this many times the tokens needed
_BATCH_CHARACTERS = 1 << 20  # per tokenizer call, which holds about 200 bytes for each
_PIECE_CHARACTERS = 1 << 15  # longer texts are cut, so that all cores work on one text
_PIECES_PER_CALL = _BATCH_CHARACTERS // _PIECE_CHARACTERS
_CONTEXT_CHARACTERS = 64  # text before a cut that the tokens after it may depend on
# Between two words, or between a line that ends in print and one that begins so: tokenizers break
# there whatever stands around it.
_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=\S)")

_HUB_ALIASES = {"c4": "allenai/c4:en", "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1"}
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[^/\\]+)?")
_ROWS_ARE_LINES = ("Salesforce/wikitext",)  # a row is a line with its line end, not a document
_FILE_SUFFIXES = {".txt", ".md", ".rst", ".py", ".csv", ".json", ".jsonl", ".parquet"}
_TABLE_SUFFIXES = {".json", ".jsonl", ".parquet"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_STRING_TYPES = ("string", "large_string")
_TEXT_COLUMNS = ("text", "content", "document", "article", "raw_content", "code")
_SAMPLING_TOKENS = 32768  # tokens per batch sampled from a model: bounds its key-value cache
_MAX_LISTED = 10  # files named in one error
_OFFLINE = (
    "Without a network, calibrate on a local file or folder, on 'stdlib' (Python's own standard "
    "library) or on 'self' (sampled from the model)"
)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Calibration tokens and where they came from.

    Attributes:
        tokens: int64 [S, L] blocks on CPU, in the order drawn.
        source: the origin in words.
        num_tokens: S * L, all of them real tokens.
        num_available_tokens: tokens read from the source, out of which the blocks were drawn.
        fingerprint: SHA-256 of `tokens` as little-endian int64, in hex.
    """

    tokens: Tensor
    source: str
    num_tokens: int
    num_available_tokens: int
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class _Text:
    """An opened source of text: its documents, its name in words, and how to read it."""

    documents: Iterable[Any]
    source: str
    is_stream: bool = False
    is_one_document: bool = False  # the documents are its parts: nothing goes between them


def load_calibration(
    source: Any,
    tokenizer: Any,
    config: CalibrationConfig,
    num_samples: int,
    model: nn.Module | None = None,
) -> Calibration:
    """Draw `num_samples` blocks of `config.max_seq_length` tokens from a source.

    Text is tokenised without special tokens; documents are joined with the tokenizer's end-of-text
    token, if it has one, and blank ones are left out. Deterministic for a seed.

    Args:
        source: one of
            - "stdlib" or "self" (a folder of that name is "./stdlib");
            - a path: a file of text, of JSON lines or in Parquet, or a folder of them, read
              recursively in sorted order without hidden entries (names that begin with a dot);
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
    length, needed = config.max_seq_length, num_samples * config.max_seq_length
    if num_samples < 1:
        raise ProxsparseError(f"num_samples is {num_samples}: at least 1 block must be drawn")
    _check_length(length, model)
    if isinstance(source, str) and source == "self":
        words = "sampled from the model itself"
        _refuse_unused(config, words, "split", "text_column")
        blocks = _sample(model, tokenizer, num_samples, length, config.seed)
        return _calibration(blocks, words, blocks.numel())

    text = _open(source, config)
    first, documents = _peek(text.documents)
    limit = _STREAM_SLACK * needed if text.is_stream else None
    if isinstance(first, Tensor | Mapping):
        _refuse_unused(config, text.source, "split", "text_column")
        tokens = _concatenate(map(_ids, documents), limit)
    else:
        if tokenizer is None:
            raise ProxsparseError(f"calibrating on {text.source} needs the model's tokenizer")
        separator = None if text.is_one_document else getattr(tokenizer, "eos_token_id", None)
        documents = _only_text(documents, text.source)
        tokens = _concatenate(_tokenize_documents(documents, tokenizer, separator), limit)
    if tokens.numel() == 0:
        raise ProxsparseError(f"{text.source} holds no text: there is nothing to calibrate on")
    _check_ids(tokens, model)
    blocks = to_blocks(tokens, length)
    if blocks.shape[0] < num_samples:
        raise ProxsparseError(
            f"{num_samples:,} samples of {length:,} tokens were asked for, which is {needed:,} "
            f"tokens, but {text.source} has {tokens.numel():,} ({blocks.shape[0]:,} samples): give "
            "more text, or a smaller --num-calibration-samples or --max-seq-length"
        )
    generator = torch.Generator().manual_seed(config.seed)
    drawn = torch.randperm(blocks.shape[0], generator=generator)[:num_samples]
    return _calibration(blocks[drawn], text.source, tokens.numel())


def _calibration(blocks: Tensor, source: str, num_available_tokens: int) -> Calibration:
    data = blocks.numpy().astype("<i8").tobytes()
    digest = hashlib.sha256(data).hexdigest()
    return Calibration(blocks, source, blocks.numel(), num_available_tokens, digest)


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


def _tokenize_documents(
    documents: Iterable[str], tokenizer: Any, separator: int | None
) -> Iterator[Tensor]:
    """The tokens of each document, with `separator` between documents."""
    between = torch.tensor([] if separator is None else [separator], dtype=torch.int64)
    is_first = True
    for batch in _batches(documents):
        if len(batch) == 1:
            encoded = [tokenize_text(batch[0], tokenizer)]
        else:
            encoded = _encode(batch, tokenizer)
        for ids in encoded:
            yield ids if is_first else torch.cat((between, ids))
            is_first = False


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
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


def _concatenate(parts: Iterable[Tensor], limit: int | None) -> Tensor:
    """All parts in one tensor [T]; reads no further once `limit` tokens are there."""
    kept, total = [torch.empty(0, dtype=torch.int64)], 0
    with tqdm(desc="calibration text", unit="token", disable=None, leave=False) as bar:
        for part in parts:
            kept.append(part)
            total += part.numel()
            bar.update(part.numel())
            if limit is not None and total >= limit:
                break
    return torch.cat(kept)


def _check_length(length: int, model: nn.Module | None) -> None:
    positions = getattr(_text_config(model), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ProxsparseError(
            f"--max-seq-length is {length}, but the model has {positions} positions: use at most "
            f"{positions}"
        )


def _check_ids(tokens: Tensor, model: nn.Module | None) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    size = getattr(_text_config(model), "vocab_size", None)
    if low < 0:
        raise ProxsparseError(
            f"token id {low} is negative: padding must be left out with an attention_mask"
        )
    if size is not None and high >= size:
        raise ProxsparseError(
            f"token id {high} is outside the model's vocabulary of {size}: the tokens come from "
            "another model's tokenizer; use the one saved with this model"
        )


def _text_config(model: nn.Module | None) -> Any:
    """The model's config, or its text part where it has several; None without a model."""
    config: Any = getattr(model, "config", None)
    return config if config is None else config.get_text_config()


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
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "is no file"
        if not path.exists():
            state = "does not exist"
        raise ProxsparseError(f"{path} {state}: give the path of a text file")
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ProxsparseError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ProxsparseError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}): give a "
            "text file, or convert it to UTF-8"
        ) from error
    if "\0" in text:
        raise ProxsparseError(f"{path} holds NUL bytes, so it is not a text file")
    return text


def _open(source: Any, config: CalibrationConfig) -> _Text:
    if isinstance(source, str | os.PathLike):
        return _open_name(os.fspath(source), config, is_path=not isinstance(source, str))
    if isinstance(source, Tensor):
        return _Text([source], "token ids")
    datasets = sys.modules.get("datasets")  # whoever holds a dataset has imported it
    if datasets and isinstance(source, datasets.Dataset | datasets.IterableDataset):
        words = f"a {type(source).__name__}"
        _refuse_unused(config, words, "split")
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
    _refuse_unused(config, f"a {type(source).__name__}", "split", "text_column")
    if isinstance(source, Sequence):
        return _Text(source, f"a {type(source).__name__} of length {len(source):,}")
    return _Text(source, f"a {type(source).__name__}", is_stream=True)


def _open_name(name: str, config: CalibrationConfig, is_path: bool) -> _Text:
    if name == "stdlib" and not is_path:
        from proxsparse.data.corpus import stdlib_texts

        words = f"the standard library of Python {sys.version_info.major}.{sys.version_info.minor}"
        _refuse_unused(config, words, "split", "text_column")
        return _Text([text for _, text in stdlib_texts("train")], words)
    # os.path, because pathlib raises on a name that is too long, such as a text passed as a name.
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        return _open_folder(path, config)
    if name and os.path.exists(path):
        _refuse_unused(config, str(path), "split")
        documents = _read_file(path, config.text_column)
        is_table = path.suffix.lower() in _TABLE_SUFFIXES
        if not is_table:
            _refuse_unused(config, str(path), "text_column")
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
    _refuse_unused(config, str(folder), "split")
    files = sorted(_files_in(folder))
    if not files:
        raise ProxsparseError(f"{folder} holds no files (hidden ones are not read)")
    if not any(path.suffix.lower() in _TABLE_SUFFIXES for path in files):
        _refuse_unused(config, str(folder), "text_column")
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


def _read_file(path: Path, text_column: str | None) -> list[Any]:
    """The documents of one file, chosen by its suffix: Parquet or JSON rows, or the text as one."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path, text_column)
    text = _decode(path)
    return _parse_json_lines(text, path, text_column) if suffix in _TABLE_SUFFIXES else [text]


def _parse_json_lines(text: str, path: Path, text_column: str | None) -> list[Any]:
    documents, column = [], None
    # Not splitlines(): JSON strings may hold U+2028 and the like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ProxsparseError(
                f"{where} is not JSON ({error.msg}): each line must be one JSON object"
            ) from error
        if not isinstance(row, dict):
            raise ProxsparseError(f"{where} is no JSON object: each line must be one")
        if column not in row:
            column = _text_column(_strings_in(row), column or text_column, where)
        documents.append(row[column])
    return documents


def _read_parquet(path: Path, text_column: str | None) -> list[Any]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ProxsparseError(f"{path} needs pyarrow: pip install pyarrow") from error

    try:
        schema = parquet.read_schema(path)
        columns = {field.name: str(field.type) in _STRING_TYPES for field in schema}
        text_column = _text_column(columns, text_column, str(path))
        table = parquet.read_table(path, columns=[text_column])
    except (OSError, pa.ArrowException) as error:
        raise ProxsparseError(f"{path} is not a readable Parquet file: {error}") from error
    return list(table.column(0).to_pylist())


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
        parts = map("".join, _batches(lines))
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


def _rows(dataset: Any, text_column: str | None, words: str) -> Iterator[Any]:
    """The text column of a `datasets` dataset, checked at once; its rows, read lazily."""
    features = dataset.features  # None for a stream that has not been looked into
    if features is None:
        columns = _strings_in(next(iter(dataset), {}))
    else:
        columns = {name: getattr(f, "dtype", "") in _STRING_TYPES for name, f in features.items()}
    column = _text_column(columns, text_column, words)

    def read() -> Iterator[Any]:
        with _explaining_failure(words):
            for row in dataset.select_columns(column):
                yield row[column]

    return read()


def _strings_in(row: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each column of a row holds, or may hold, a string."""
    return {name: value is None or isinstance(value, str) for name, value in row.items()}


def _text_column(columns: Mapping[str, bool], wanted: str | None, words: str) -> str:
    """The column that holds the text.

    Args:
        columns: whether each column holds strings.
        wanted: the user's choice, if any.
        words: where the columns are, for errors.
    """
    strings = [name for name, is_string in columns.items() if is_string]
    if wanted is not None:
        if wanted in strings:
            return wanted
        problem = "does not hold text" if wanted in columns else "does not exist"
        raise ProxsparseError(
            f"{words}: column {wanted!r} {problem}; its columns are {_listed(columns)}"
        )
    known = [name for name in _TEXT_COLUMNS if name in strings]
    if known or len(strings) == 1:
        return (known or strings)[0]
    raise ProxsparseError(
        f"{words}: which column holds the text? Name it with --text-column; "
        f"its columns are {_listed(columns)}"
    )


def _listed(columns: Mapping[str, bool]) -> str:
    return ", ".join(f"{k} (text)" if v else k for k, v in columns.items()) or "none"


def _peek(items: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """The first item (None without one), and an iterator over all of them."""
    iterator = iter(items)
    head = list(itertools.islice(iterator, 1))
    return (head[0] if head else None), itertools.chain(head, iterator)


def _only_text(documents: Iterable[Any], words: str) -> Iterator[str]:
    """The documents that say something; a missing value (None) counts as blank."""
    for index, document in enumerate(documents):
        if document is None:
            continue
        if not isinstance(document, str):
            raise ProxsparseError(f"{words}: item {index} is a {type(document).__name__}, not text")
        if document and not document.isspace():
            yield document


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


def _refuse_unused(config: CalibrationConfig, words: str, *fields: str) -> None:
    """An option that would change nothing is a misunderstanding: say so."""
    for name in fields:
        value = getattr(config, name)
        if value is not None:
            flag = "--" + name.replace("_", "-")
            raise ProxsparseError(f"{flag} is {value!r}, but {words} has none: leave it out")


@torch.no_grad()
def _sample(
    model: nn.Module | None, tokenizer: Any, num_samples: int, length: int, seed: int
) -> Tensor:
    """Blocks [num_samples, length] of the model's own text, at temperature 1.

    A block begins with the beginning-of-text token, or with a random one where there is none, and
    goes on through end-of-text tokens. All randomness comes from a generator of its own on the
    model's device: the global state is untouched, and a seed gives the same text on the same
    device.
    """
    if model is None:
        raise ProxsparseError("calibration 'self' samples from the model: pass the model")
    config = _text_config(model)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    bos = getattr(tokenizer, "bos_token_id", None)
    bos = getattr(config, "bos_token_id", None) if bos is None else bos
    size = config.vocab_size if tokenizer is None else min(config.vocab_size, len(tokenizer))
    per_batch = max(1, _SAMPLING_TOKENS // length)
    was_training = model.training
    model.eval()
    blocks = []
    total = num_samples * (length - 1)
    bar = tqdm(total=total, desc="sampling", unit="token", disable=None, leave=False)
    try:
        for begin in range(0, num_samples, per_batch):
            shape = (min(per_batch, num_samples - begin), 1)
            if bos is None:
                first = torch.randint(size, shape, generator=generator, device=device)
            else:
                first = torch.full(shape, bos, device=device)
            blocks.append(_continue(model, first, length, generator, bar.update).cpu())
    finally:
        bar.close()
        model.train(was_training)
    return torch.cat(blocks)


def _continue(
    model: nn.Module,
    tokens: Tensor,
    length: int,
    generator: torch.Generator,
    progress: Callable[[int], Any],
) -> Tensor:
    """Sample until tokens [B, 1] have become [B, length]."""
    sampled, cache = [tokens], None
    for _ in range(length - 1):
        with autocast(model):
            output = model(input_ids=sampled[-1], past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        logits = output.logits[:, -1].float()
        # Checked once: on a GPU every look waits for the device.
        if len(sampled) == 1 and not torch.isfinite(logits).all():
            raise ProxsparseError("calibration 'self': the model's logits are not finite")
        if cache is None:
            raise ProxsparseError(
                f"calibration 'self': {type(model).__name__} keeps no key-value cache; give a text"
            )
        sampled.append(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        progress(tokens.shape[0])
    return torch.cat(sampled, dim=1)
