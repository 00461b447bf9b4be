"""Damaged and misleading files of text: only a ProxsparseError may come out, soon and bounded."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxsparse.data.sources import read_documents
from proxsparse.errors import ProxsparseError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

_ROWS = [{"id": str(i), "text": f'the "cat", {i}\nsat'} for i in range(20)]
_MAX_SECONDS, _MAX_BYTES = 10, 256 << 20


def _parquet() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(_ROWS), sink)
    return sink.getvalue()


def _zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


_LINES = "\n".join(map(json.dumps, _ROWS)).encode()
_CHAT = json.dumps({"id": "1", "messages": [{"role": "user", "content": "hi"}]}).encode()
_CSV = b'id,text\n1,"the ""cat"", \nsat"\n2,mat\n'
_SEEDS = {
    "a.txt": b"the cat\r\nsat",
    "a.jsonl": _LINES,
    "chat.json": _CHAT,
    "a.csv": _CSV,
    "a.tsv": _CSV.replace(b",", b"\t"),
    "a.parquet": _parquet(),
    "a.jsonl.gz": gzip.compress(_LINES),
    "a.csv.bz2": bz2.compress(_CSV),
    "a.csv.xz": lzma.compress(_CSV),
    "a.jsonl.zst": _zstd(_LINES),
}
_TOKENS = [
    b"",
    b"\0",
    b"\xff",
    b'"',
    b"[" * 5000,
    b"{}",
    b"null",
    b"9" * 5000,
    b"\n",
    b",",
    b"PAR1",
]
_Edit = st.tuples(st.floats(0, 1), st.integers(0, 40), st.sampled_from(_TOKENS) | st.binary())


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Holds what runs inside to a peak of memory, of Python and of Arrow, which count apart."""
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)  # its peak begins at zero
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
        tracemalloc.stop()
        pa.set_memory_pool(default)
    assert peak < _MAX_BYTES


def _attack(folder: Path, name: str, edits: list[tuple[float, int, bytes]]) -> None:
    data = _SEEDS[name]
    for place, length, new in edits:
        begin = int(place * len(data))
        data = data[:begin] + new + data[begin + length :]
    path = folder / name
    path.write_bytes(data)
    began = time.perf_counter()
    with _bounded(), contextlib.suppress(ProxsparseError):
        documents: list[Any] = read_documents(path, None)
        assert all(isinstance(document, str) for document in documents)
    assert time.perf_counter() - began < _MAX_SECONDS


_quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
_edits = st.lists(_Edit, min_size=1, max_size=4)


@pytest.mark.parametrize("name", _SEEDS)
@settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=_quiet)
@given(edits=_edits)
def test_damaged_files(name: str, edits: list[tuple[float, int, bytes]], tmp_path: Path) -> None:
    _attack(tmp_path, name, edits)


@pytest.mark.slow
@pytest.mark.parametrize("name", _SEEDS)
@settings(max_examples=2000, deadline=None, suppress_health_check=_quiet)
@given(edits=_edits)
def test_more_damaged_files(
    name: str, edits: list[tuple[float, int, bytes]], tmp_path: Path
) -> None:
    _attack(tmp_path, name, edits)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_made_to_fill_the_memory(suffix: str, tmp_path: Path) -> None:
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack[suffix](b"a" * (80 << 20)))
    with pytest.raises(ProxsparseError, match="unpacks to more than"):
        read_documents(path, None)


@pytest.mark.parametrize("kind", ["dictionary", "plain", "binary"])
def test_a_parquet_file_made_to_fill_the_memory(kind: str, tmp_path: Path) -> None:
    long: Any = "x" * (1 << 20)
    values = pa.array([long if kind != "binary" else long.encode()])
    if kind == "dictionary":
        values = values.dictionary_encode()
    table = pa.table({"text": values.take(pa.array([0] * 500))})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    with _bounded(), pytest.raises(ProxsparseError, match="unpacks to more than"):
        read_documents(tmp_path / "a.parquet", None)


@pytest.mark.parametrize("name", _SEEDS)
def test_sound_files_are_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(_SEEDS[name])
    if name == "chat.json":
        with pytest.raises(ProxsparseError, match="no chat template"):
            read_documents(path, None)
    else:
        assert read_documents(path, None)[0].startswith("the ")


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_every_arrow_type_of_strings(kind: Any, tmp_path: Path) -> None:
    values = pa.array(["the cat", None, "a mat"]).cast(kind)
    parquet.write_table(pa.table({"n": [1, 2, 3], "text": values}), tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet", None) == ["the cat", "a mat"]


class _Chat:
    chat_template, bos_token = "x", "<s>"

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        return "<s>" + "".join(f"{m['role']}: {m['content']}\n" for m in messages)


@pytest.mark.parametrize(
    ("column", "messages"),
    [
        ("messages", [{"role": "user", "content": "hi"}]),
        ("conversations", [{"from": "human", "value": "hi"}]),
    ],
)
def test_conversations(column: str, messages: list[dict[str, str]], tmp_path: Path) -> None:
    rows = [{"id": "chat-1", column: messages}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read_documents(tmp_path / name, _Chat()) == ["user: hi\n"]
    (tmp_path / "a.jsonl").write_text(f'{json.dumps(rows[0])}\n{{"id": "2", "{column}": []}}')
    assert read_documents(tmp_path / "a.jsonl", _Chat()) == ["user: hi\n"]
    (tmp_path / "b.jsonl").write_text('{"id": "chat-1", "n": 1}')
    with pytest.raises(ProxsparseError, match=r"which column.*id \(text\), n"):
        read_documents(tmp_path / "b.jsonl", _Chat())
