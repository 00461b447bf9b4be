"""Calibration: every source, exact tokenisation, honest counts, and each way to get it wrong."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerFast

from proxsparse.config import CalibrationConfig
from proxsparse.data import corpus, self_sampling, tokenizing, windows
from proxsparse.data.calibration import load_calibration
from proxsparse.data.sources import read_text
from proxsparse.data.tokenizing import to_blocks, tokenize_text
from proxsparse.errors import ProxsparseError

# Sources from files and the Hub go through `datasets`, which GPU machines may lack.
datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

_EOS = "<|end|>"
_LINE = "the cat sat on a mat: then (it) left. x = 1.5 naïve 中文 don't"
_WORDS = _LINE.split()
_SPACES = (" ", " ", " ", " ", "\n", "\n\n", "  ", " \n ", "\t")


def _prose(num_words: int) -> str:
    """Words with every kind of space between them, blank lines among them."""
    rng = random.Random(0)
    return "".join(rng.choice(_WORDS) + rng.choice(_SPACES) for _ in range(num_words))


def _byte_level() -> Tokenizer:
    """Splits into words first, as the tokenizers of most current models do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[_EOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator([_prose(1000)], trainer)
    return tokenizer


def _merging(merges: list[tuple[str, str]]) -> Tokenizer:
    """Merges characters across the whole text, without splitting it into words."""
    symbols = sorted({*"".join(_WORDS), *"".join(_SPACES), "▁"})
    names = ["?", *symbols, *("".join(pair) for pair in merges)]
    vocabulary = {name: i for i, name in enumerate(names)}
    return Tokenizer(models.BPE(vocabulary, merges, unk_token="?"))


def _sentencepiece() -> Tokenizer:
    """Puts a space before the text, which a piece of a text must not get."""
    tokenizer = _merging(
        [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "s"), ("a", "t"), ("▁s", "at")]
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def _across_words() -> Tokenizer:
    """Has tokens across every place where a text could be cut."""
    ends, begins = (sorted({word[i] for word in _WORDS}) for i in (-1, 0))
    return _merging([*((end, " ") for end in ends), *(("\n", begin) for begin in begins)])


def _wrap(tokenizer: Tokenizer, **special: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return _wrap(_byte_level(), eos_token=_EOS)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(_prose(2000), encoding="utf-8", newline="")
    return path


def _config(**settings: Any) -> CalibrationConfig:
    return CalibrationConfig(**{"max_seq_length": 16, **settings})


def _available(source: Any, tokenizer: Any, **settings: Any) -> list[int]:
    """All tokens of a source, in order: one block holds nearly everything if it is drawn alone."""
    total = load_calibration(source, tokenizer, _config(max_seq_length=2, **settings), 1)
    length = total.num_available_tokens
    whole = load_calibration(source, tokenizer, _config(max_seq_length=length, **settings), 1)
    return whole.tokens[0].tolist()


def _ids(tokenizer: Any, *documents: str) -> list[int]:
    """Documents tokenised one by one, with the end-of-text token between them."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(ids[0] + [i for more in ids[1:] for i in eos + more])


# Tokens.


@pytest.mark.parametrize("make", [_byte_level, _sentencepiece, _across_words])
def test_long_text_gets_the_tokens_of_one_call(make: Callable[[], Tokenizer]) -> None:
    wrapped, text = _wrap(make()), _prose(60_000)
    whole = wrapped(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenize_text(text, wrapped).tolist() == whole
    num_pieces = len(tokenizing._pieces(text, wrapped))
    assert num_pieces == 1 if make is _across_words else num_pieces > 5


def _base64(rng: random.Random) -> str:
    return base64.b64encode(rng.randbytes(45_000)).decode()


_WITHOUT_SPACES: dict[str, Callable[[random.Random], str]] = {
    "base64": _base64,
    "chinese with blank lines": lambda rng: "\n\n".join(["中文" * rng.randint(9, 90)] * 500),
    "chinese with CRLF": lambda rng: "\r\n".join(["文中" * rng.randint(9, 90)] * 500),
    "one letter": lambda rng: "a" * 60_001,
    "digits": lambda rng: "".join(rng.choices("0123456789", k=60_000)),
    "emoji": lambda rng: "".join(rng.choices("👩‍👧🇫🇷e\u0301", k=30_000)),
    "spaces": lambda rng: " " * 60_000,
    "minified": lambda rng: "".join(rng.choices("abc(){};=+", k=60_000)),
}


@pytest.mark.parametrize("make", [_byte_level, _sentencepiece, _across_words])
@pytest.mark.parametrize("kind", _WITHOUT_SPACES)
def test_text_without_spaces_is_tokenised_exactly_in_parts(
    kind: str, make: Callable[[], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW_CHARACTERS", 1 << 13)
    monkeypatch.setattr(tokenizing, "WINDOW_CHARACTERS", 1 << 13)
    monkeypatch.setattr(tokenizing, "_PIECE_CHARACTERS", 1 << 12)
    monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", 1 << 14)
    text, wrapped = _WITHOUT_SPACES[kind](random.Random(0)), _wrap(make())
    longest = 0
    call = tokenizing._call

    def spy(texts: list[str], *args: Any, **options: Any) -> Any:
        nonlocal longest
        longest = max(longest, sum(map(len, texts)))
        return call(texts, *args, **options)

    monkeypatch.setattr(tokenizing, "_call", spy)
    whole = wrapped(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenize_text(text, wrapped).tolist() == whole
    assert longest <= 1 << 14


def test_windows_that_nowhere_agree_grow() -> None:
    sizes = []

    def encode(begin: int, end: int) -> tuple[list[int], list[int]]:
        sizes.append(end - begin)
        return [end] * (end - begin), list(range(begin, end))  # each token knows the end

    assert windows.encode_in_windows(encode, 1000, 256) == [1000] * 1000
    assert sizes[-1] == 1000


def test_short_and_empty_text(tokenizer: Any) -> None:
    tokens = tokenize_text("the cat", tokenizer)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == _ids(tokenizer, "the cat")
    assert tokenize_text("", tokenizer).shape == (0,)


def test_no_special_tokens(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    raw = _byte_level()
    raw.post_processor = TemplateProcessing(single=f"{_EOS} $A", special_tokens=[(_EOS, 0)])
    assert tokenize_text("the cat", _wrap(raw)).tolist() == _ids(tokenizer, "the cat")


def test_lone_surrogate(tokenizer: Any) -> None:
    with pytest.raises(ProxsparseError, match=r"lone surrogate '\\ud800'"):
        load_calibration(["the \ud800 cat"], tokenizer, _config(), 1)


def test_to_blocks_drops_the_rest() -> None:
    assert to_blocks(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert to_blocks(torch.arange(2), 3).shape == (0, 3)


# Reading one file.


def test_read_text_keeps_line_ends_and_drops_the_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_text(path) == "one\r\ntwo\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is blank"),
        (b"abc\xff", r"not UTF-8 text \(byte 3 is 0xff\)"),
        ("text".encode("utf-16"), "not UTF-8 text"),
        (b"ab\0c", "NUL bytes"),
    ],
)
def test_read_text_refuses(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ProxsparseError, match=message):
        read_text(path)


def test_read_text_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ProxsparseError, match="is a folder"):
        read_text(tmp_path)
    with pytest.raises(ProxsparseError, match="does not exist"):
        read_text(tmp_path / "missing.txt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ProxsparseError, match="is no file"):
        read_text(tmp_path / "pipe")


# Drawing.


def test_a_text_file_is_one_document_cut_as_for_evaluation(text_file: Path, tokenizer: Any) -> None:
    tokens = tokenize_text(read_text(text_file), tokenizer)
    blocks = to_blocks(tokens, 16)
    result = load_calibration(str(text_file), tokenizer, _config(), blocks.shape[0])
    assert result.num_available_tokens == tokens.numel()
    assert sorted(result.tokens.tolist()) == sorted(blocks.tolist())
    assert result.tokens.tolist() != blocks.tolist()


def test_result_states_what_was_used(text_file: Path, tokenizer: Any) -> None:
    result = load_calibration(text_file, tokenizer, _config(), 5)
    assert result.tokens.shape == (5, 16)
    assert result.tokens.dtype == torch.int64
    assert result.num_tokens == 80
    assert str(text_file) in result.source
    data = b"".join(i.to_bytes(8, "little") for i in result.tokens.flatten().tolist())
    assert result.fingerprint == hashlib.sha256(data).hexdigest()


def test_the_seed_decides_and_the_global_generator_is_untouched(
    text_file: Path, tokenizer: Any
) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        load_calibration(text_file, tokenizer, _config(seed=seed), 5) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_too_little_text(text_file: Path, tokenizer: Any) -> None:
    available = tokenize_text(read_text(text_file), tokenizer).numel()
    message = (
        rf"1,000 samples of 64 tokens were asked for, which is 64,000 tokens, but .*text.txt has "
        rf"{available:,} \({available // 64} samples\).*fewer --tokens; or .*"
        rf"--num-calibration-samples {available // 64}"
    )
    with pytest.raises(ProxsparseError, match=message):
        load_calibration(text_file, tokenizer, _config(max_seq_length=64), 1000)
    for length in (available + 1, 10 * available):
        message = (
            rf"text.txt has {available:,} tokens, less than one sequence of {length:,}: give more "
            "text or a smaller --max-seq-length"
        )
        with pytest.raises(ProxsparseError, match=message):
            load_calibration(text_file, tokenizer, _config(max_seq_length=length), 1)
    with pytest.raises(ProxsparseError, match="num_samples is 0"):
        load_calibration(text_file, tokenizer, _config(), 0)


def test_a_text_needs_a_tokenizer(text_file: Path) -> None:
    with pytest.raises(ProxsparseError, match=r"text\.txt needs the model's tokenizer"):
        load_calibration(text_file, None, _config(), 1)


def test_blocks_must_fit_the_model(
    text_file: Path, tokenizer: Any, tiny_model: Callable[[str], Any]
) -> None:
    model = tiny_model("llama")
    with pytest.raises(ProxsparseError, match="--max-seq-length is 65, but the model has 64"):
        load_calibration(text_file, tokenizer, _config(max_seq_length=65), 1, model)
    with pytest.raises(ProxsparseError, match=r"token id \d+ is outside .* vocabulary of 96"):
        load_calibration(text_file, tokenizer, _config(), 1, model)


# Documents.


def test_documents_are_joined_with_the_end_of_text_token(tokenizer: Any) -> None:
    texts = ["the cat sat", " \n", "on a mat", ""]
    expected = _ids(tokenizer, "the cat sat", "on a mat")
    assert expected.count(tokenizer.eos_token_id) == 1
    assert _available(texts, tokenizer) == expected
    without_eos = _wrap(_byte_level())
    assert _available(texts, without_eos) == _ids(without_eos, "the cat sat", "on a mat")


def test_documents_longer_than_a_batch(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", 64)
    monkeypatch.setattr(tokenizing, "_PIECE_CHARACTERS", 32)
    monkeypatch.setattr(tokenizing, "_CONTEXT_CHARACTERS", 16)
    texts = ["the cat", _prose(50), "sat", "on", _prose(70), "a mat"]
    assert _available(texts, tokenizer) == _ids(tokenizer, *texts)


def test_stdlib_is_its_training_part(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"train": [("a.py", "the cat sat"), ("b.py", "on a mat")]}
    monkeypatch.setattr(corpus, "stdlib_texts", parts.__getitem__)
    assert _available("stdlib", tokenizer) == _ids(tokenizer, "the cat sat", "on a mat")


def test_json_lines(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["the cat\u2028sat", "on a mat"]
    rows = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join([rows[0], "", rows[1], '{"text": null}']), encoding="utf-8")
    assert _available(path, tokenizer) == _ids(tokenizer, *texts)


def test_parquet(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.parquet"
    columns = {"n": [1, 2, 3], "title": ["x", "y", "z"], "content": ["the cat", None, "on a mat"]}
    parquet.write_table(pa.table(columns), path)
    assert _available(path, tokenizer) == _ids(tokenizer, "the cat", "on a mat")
    assert _available(path, tokenizer, text_column="title") == _ids(tokenizer, "x", "y", "z")


def test_a_folder_is_read_in_sorted_order(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "z.md").write_text("a mat")
    (tmp_path / "sub" / "b.jsonl").write_text('{"text": "sat on"}')
    (tmp_path / "a.py").write_text("the cat")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / ".git" / "index").write_bytes(b"\0")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    assert _available(tmp_path, tokenizer) == _ids(tokenizer, "the cat", "sat on", "a mat")
    assert "(4 files)" in load_calibration(tmp_path, tokenizer, _config(max_seq_length=2), 1).source


def test_a_folder_with_unreadable_files(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "c.jsonl").write_text("{")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    message = (
        r"(?s)3 of the 4 files.*b\.png is not UTF-8.*c\.jsonl, line 1 is not JSON.*link is a f"
    )
    with pytest.raises(ProxsparseError, match=message):
        load_calibration(tmp_path, tokenizer, _config(), 1)
    for i in range(20):
        (tmp_path / f"{i}.bin").write_bytes(b"\0")
    with pytest.raises(ProxsparseError, match="and 13 more"):
        load_calibration(tmp_path, tokenizer, _config(), 1)


def test_sources_without_text(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ProxsparseError, match="holds no files"):
        load_calibration(tmp_path, tokenizer, _config(), 1)
    (tmp_path / "a.txt").write_text("\n \n")
    for source in (tmp_path, tmp_path / "a.txt", [], ["", " "]):
        with pytest.raises(ProxsparseError, match="holds no text"):
            load_calibration(source, tokenizer, _config(), 1)


@pytest.mark.parametrize(
    ("lines", "column", "message"),
    [
        ('{"text": "a"}\n{"text"', None, r"line 2 is not JSON"),
        ('["text"]', None, r"line 1 is no JSON object"),
        ('{"a": "x", "b": "y", "n": 1}', None, r"which column.*a \(text\), b \(text\), n"),
        ('{"n": 1}', None, r"which column holds the text\?"),
        ('{"text": "a"}', "body", r"column 'body' does not exist.*text \(text\)"),
        ('{"text": "a"}\n{"title": "b"}', None, r"line 2: column 'text' does not exist.*title"),
        ('{"text": "a", "n": 1}', "n", r"column 'n' does not hold text"),
        ('{"text": "a"}\n{"text": 3}', None, r"item 1 is a int, not text"),
    ],
)
def test_json_lines_refused(
    lines: str, column: str | None, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "a.json"
    path.write_text(lines)
    with pytest.raises(ProxsparseError, match=message):
        load_calibration(path, tokenizer, _config(text_column=column), 1)


def test_parquet_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(ProxsparseError, match="not a readable Parquet file"):
        load_calibration(path, tokenizer, _config(), 1)
    parquet.write_table(pa.table({"n": [1], "m": [2.0]}), path)
    with pytest.raises(ProxsparseError, match=r"a\.parquet: which column holds the text.*n, m"):
        load_calibration(path, tokenizer, _config(), 1)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (None, ["x"], r"which column .*id \(text\), words \(text\)"),
        ("title", ["x"], "column 'title' does not exist"),
        ("words", [b"\xff"], "bytes that are not UTF-8"),
    ],
)
def test_a_sound_parquet_file_is_not_called_unreadable(
    column: str | None, values: list[Any], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"id": ["1"], "words": values}), path)
    with pytest.raises(ProxsparseError, match=message) as caught:
        load_calibration(path, tokenizer, _config(text_column=column), 1)
    assert "readable" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "missing.txt",
        "./missing",
        "/no/such/folder",
        "a/b/c",
        "org/data.jsonl",
        "imdb",
        "",
        "the cat " * 99,
    ],
)
def test_names_of_nothing(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(ProxsparseError, match="no such file or folder, and it is not the name"):
        load_calibration(name, tokenizer, _config(), 1)


def test_a_missing_path_is_no_hub_name(tokenizer: Any) -> None:
    with pytest.raises(ProxsparseError, match="no such file or folder"):
        load_calibration(Path("org/name"), tokenizer, _config(), 1)


@pytest.mark.parametrize("source", [b"bytes", 3, None])
def test_sources_of_no_use(source: Any, tokenizer: Any) -> None:
    with pytest.raises(ProxsparseError, match="pass a path or name, a list of texts"):
        load_calibration(source, tokenizer, _config(), 1)


def test_options_that_would_change_nothing(text_file: Path, tokenizer: Any) -> None:
    batches = torch.zeros(1, 16, dtype=torch.int64)
    dataset = datasets.Dataset.from_dict({"text": ["the cat"]})
    for source in (text_file, text_file.parent, "stdlib", "self", ["the cat"], batches, dataset):
        with pytest.raises(ProxsparseError, match=r"--split is 'test', but .* has none"):
            load_calibration(source, tokenizer, _config(split="test"), 1)
        if source is not dataset:
            with pytest.raises(ProxsparseError, match=r"--text-column is 'body', but .* has none"):
                load_calibration(source, tokenizer, _config(text_column="body"), 1)


# The Hub, and datasets in memory.


class _Hub:
    """Stands in for `datasets.load_dataset`: the same endless or finite rows for every name."""

    def __init__(self, rows: Callable[[], Iterator[dict[str, Any]]]) -> None:
        self.rows, self.num_read, self.asked = rows, 0, ()

    def __call__(self, name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert streaming
        self.asked = (name, config, split)
        return datasets.IterableDataset.from_generator(self._count)

    def _count(self) -> Iterator[dict[str, Any]]:
        for row in self.rows():
            self.num_read += 1
            yield row


@pytest.mark.parametrize(
    ("name", "split", "asked"),
    [
        ("c4", None, ("allenai/c4", "en", "train")),
        ("wikitext2", None, ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
        ("org/name", "validation", ("org/name", None, "validation")),
        ("org/name:some-config", None, ("org/name", "some-config", "train")),
    ],
)
def test_hub_names(
    name: str,
    split: str | None,
    asked: tuple[str, str | None, str],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = _Hub(lambda: iter([{"text": "the cat sat on a mat "}] * 9))
    monkeypatch.setattr(datasets, "load_dataset", hub)
    result = load_calibration(name, tokenizer, _config(split=split), 1)
    assert hub.asked == asked
    assert asked[0] in result.source
    assert asked[2] in result.source


def test_a_stream_is_read_until_there_is_enough(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", 256)
    hub = _Hub(lambda: ({"text": f"the cat {i}"} for i in itertools.count()))
    monkeypatch.setattr(datasets, "load_dataset", hub)
    result = load_calibration("c4", tokenizer, _config(), 10)
    assert 320 <= result.num_available_tokens < 340
    assert hub.num_read < 150
    assert (result.tokens == tokenizer.eos_token_id).any()


def test_rows_of_wikitext_are_lines(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["", " = The cat = \n", "", " The cat sat . \n", " On a mat . \n"]
    monkeypatch.setattr(datasets, "load_dataset", _Hub(lambda: ({"text": t} for t in lines)))
    text = " \n = The cat = \n \n The cat sat . \n On a mat . \n"
    assert _available("wikitext2", tokenizer) == _ids(tokenizer, text)
    monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", 8)
    result = load_calibration("wikitext2", tokenizer, _config(max_seq_length=8), 2)
    assert result.num_available_tokens > 16
    assert tokenizer.eos_token_id not in result.tokens


def test_a_local_path_wins_over_a_hub_name(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", None)
    monkeypatch.chdir(tmp_path)
    for name in ("c4", "org/name", "self"):
        Path(name).mkdir(parents=True)
        Path(name, "a.txt").write_text("the cat")
    for source in ("c4", "org/name", "./self", Path("self")):
        assert _available(source, tokenizer) == _ids(tokenizer, "the cat")


def _broken_stream() -> Iterator[dict[str, Any]]:
    yield {"text": "the cat"}
    raise OSError("connection lost")


def test_hub_failures(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = (
        r"allenai/c4 \(en, train\) cannot be read: ConnectionError: no route.*'stdlib'.*'self'"
    )
    with pytest.raises(ProxsparseError, match=message):
        load_calibration("c4", tokenizer, _config(), 1)
    monkeypatch.setattr(datasets, "load_dataset", _Hub(_broken_stream))
    with pytest.raises(ProxsparseError, match=r"connection lost.*'stdlib'"):
        load_calibration("org/name", tokenizer, _config(), 1)
    hub = _Hub(lambda: iter([{"title": "a", "body": "b"}]))
    monkeypatch.setattr(datasets, "load_dataset", hub)
    with pytest.raises(ProxsparseError, match=r"org/name \(train\): which column.*title.*body"):
        load_calibration("org/name", tokenizer, _config(), 1)


def test_datasets_in_memory(tokenizer: Any) -> None:
    columns = {"n": [1, 2, 3], "body": ["the cat", None, "on a mat"]}
    dataset = datasets.Dataset.from_dict(columns)
    expected = _ids(tokenizer, "the cat", "on a mat")
    assert _available(dataset, tokenizer, text_column="body") == expected
    assert _available(dataset.to_iterable_dataset(), tokenizer, text_column="body") == expected
    assert _available(dataset.select_columns("body"), tokenizer) == expected
    with pytest.raises(ProxsparseError, match="which column holds the text"):
        load_calibration(dataset, tokenizer, _config(), 1)
    with pytest.raises(
        ProxsparseError, match=r"Dataset: column 'text' does not exist.*body \(text\)"
    ):
        load_calibration(dataset, tokenizer, _config(text_column="text"), 1)
    with pytest.raises(ProxsparseError, match="DatasetDict with the keys train: pass one"):
        load_calibration(datasets.DatasetDict(train=dataset), tokenizer, _config(), 1)


# Token ids.


def test_batches_of_token_ids() -> None:
    rows = torch.arange(48).view(6, 8)
    tensors = [rows[:4], rows[4:].to(torch.int32)]
    dicts = [{"input_ids": rows}]
    loader = DataLoader(list(rows), batch_size=4)  # type: ignore[arg-type]
    for source in (rows, tensors, dicts, loader):
        result = load_calibration(source, None, _config(max_seq_length=8), 6)
        assert sorted(result.tokens.tolist()) == rows.tolist()


def test_masked_tokens_are_left_out() -> None:
    ids = torch.tensor([[7, 7, 1, 2], [3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert _available([{"input_ids": ids, "attention_mask": mask}], None) == [1, 2, 3, 4, 5, 6]


def test_endless_batches_are_read_until_there_are_enough() -> None:
    batches = (torch.full((1, 16), i) for i in itertools.count())
    result = load_calibration(batches, None, _config(), 4)
    assert result.num_available_tokens == 128
    assert result.tokens.max() < 8
    assert next(batches)[0, 0] == 8


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 16), "holds a torch.float32 tensor"),
        (torch.zeros(2, 16, dtype=torch.bool), "holds a torch.bool tensor"),
        ({"input_ids": [[1, 2]]}, "holds a list"),
        ({"labels": torch.zeros(1, 2)}, "has the keys labels, but no 'input_ids'"),
        (
            {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(2)},
            r"\[2\].*\[1, 2\]",
        ),
        (torch.tensor([[1, -100]]), "token id -100 is negative"),
    ],
)
def test_batches_refused(batch: Any, message: str) -> None:
    with pytest.raises(ProxsparseError, match=message):
        load_calibration([batch], None, _config(max_seq_length=2), 1)


def test_batches_that_are_neither_text_nor_ids(tokenizer: Any) -> None:
    loader = DataLoader(TensorDataset(torch.zeros(2, 16)))
    with pytest.raises(ProxsparseError, match="a DataLoader: item 0 is a list, not text"):
        load_calibration(loader, tokenizer, _config(), 1)
    with pytest.raises(ProxsparseError, match="a list of length 2: item 1 is a int, not text"):
        load_calibration(["the cat", 3], tokenizer, _config(), 1)


# Sampling from the model.


def _naive_samples(model: Any, first: torch.Tensor, length: int, seed: int) -> torch.Tensor:
    """The same draws, with the whole sequence computed anew for each token."""
    generator, tokens = torch.Generator().manual_seed(seed), first
    for _ in range(length - 1):
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits[:, -1]
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat((tokens, token), 1)
    return tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
def test_self_samples_from_the_model(name: str, tiny_model: Callable[[str], Any]) -> None:
    model = tiny_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # a random model is nearly uniform: sharpen, so that context matters
    model.train()
    state = torch.get_rng_state()
    result = load_calibration("self", None, _config(max_seq_length=64, seed=3), 3, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    bos = torch.full((3, 1), model.config.bos_token_id)
    assert torch.equal(result.tokens, _naive_samples(model.eval(), bos, 64, 3))
    assert result.num_tokens == result.num_available_tokens == 192


def test_self_in_batches_is_reproducible(
    tiny_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_sampling, "_SAMPLING_TOKENS", 32)
    model = tiny_model("llama")
    first, again = (load_calibration("self", None, _config(), 5, model) for _ in range(2))
    assert first.tokens.shape == (5, 16)
    assert first.fingerprint == again.fingerprint
    assert len({tuple(block) for block in first.tokens.tolist()}) == 5


def test_self_without_a_beginning_of_text_token(
    tokenizer: Any, tiny_model: Callable[[str], Any]
) -> None:
    model = tiny_model("llama")
    model.config.bos_token_id = None
    result = load_calibration("self", tokenizer, _config(max_seq_length=2), 50, model)
    assert result.tokens[:, 0].unique().numel() > 10
    assert result.tokens.max() < 96


def test_self_refused(tiny_model: Callable[[str], Any]) -> None:
    with pytest.raises(ProxsparseError, match="'self' samples from the model: pass the model"):
        load_calibration("self", None, _config(), 1)
    model = tiny_model("llama")
    with pytest.raises(ProxsparseError, match="--max-seq-length is 65"):
        load_calibration("self", None, _config(max_seq_length=65), 1, model)
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ProxsparseError, match="logits are not finite"):
        load_calibration("self", None, _config(), 1, model)
