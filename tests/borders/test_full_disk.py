"""A disk that fills up at any write: one sentence with the way out, and nothing lost or half done.

The limit on the size of a file (RLIMIT_FSIZE) makes the kernel itself refuse a write in the
middle, in Python and in Rust alike, without root. It knows no total, so writes that come late are
refused by a function in the place of `os.fsync`, which every durable file passes through.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import SafetensorError

import proxsparse
from proxsparse.errors import ProxsparseError
from proxsparse.jobs.pack import pack, unpack
from proxsparse.jobs.prune import apply, prune

DEMO = Path(proxsparse.__file__).parent / "demo_model"
FAST: dict[str, Any] = {"steps": 4, "batch_size": 2, "max_seq_length": 32, "checkpoint_every": 2}
NO_ROOM = r"(No space left|File too large).*make room, then (run it again|continue with --resume)"


@contextlib.contextmanager
def files_at_most(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(re.__file__).read_text() * 2)
    return path


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: Any) -> Path:
    output: Path = tmp_path_factory.mktemp("pruned") / "model"
    prune(DEMO, output, method="magnitude")
    return output


@pytest.fixture(scope="module")
def packed(pruned: Path) -> Path:
    pack(pruned, pruned.with_name("packed"))
    return pruned.with_name("packed")


# Model, tokenizer, masks, report and marker are each too large for one of these.
@pytest.mark.parametrize("limit", [0, 2_000, 200_000, 2_000_000])
def test_no_command_leaves_half_a_result(
    tmp_path: Path, pruned: Path, packed: Path, limit: int
) -> None:
    output = tmp_path / "out"
    commands = (
        lambda: prune(DEMO, output, method="magnitude"),
        lambda: apply(DEMO, pruned / "proxsparse.masks", output),
        lambda: pack(pruned, output),
        lambda: unpack(packed, output),
    )
    for command in commands:
        with files_at_most(limit), pytest.raises(ProxsparseError) as raised:
            command()
        message = str(raised.value)
        assert re.search(NO_ROOM, message) or "cannot be made" in message
        assert "\n" not in message
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [3_000, 1_000_000])
def test_checkpoints_that_do_not_fit(tmp_path: Path, text: Path, limit: int) -> None:
    with files_at_most(limit), pytest.raises(ProxsparseError, match="make room") as raised:
        prune(DEMO, tmp_path / "out", calibration=text, **FAST)
    assert "checkpoint" in str(raised.value) and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("nth", [0, 6, 12, 18])
def test_a_learned_run_goes_on_once_there_is_room(
    tmp_path: Path, text: Path, monkeypatch: Any, nth: int, whole: bytes
) -> None:
    """The disk is full at the nth durable write; whatever that is, the same bits come out after."""
    count, real = 0, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(ProxsparseError, match=r"No space left|is full|cannot be made"):
            prune(DEMO, output, calibration=text, **FAST)
    assert not output.exists()
    resume = (tmp_path / "out.partial").exists()
    assert resume or list(tmp_path.iterdir()) == []
    prune(DEMO, output, calibration=text, resume=resume, **FAST)
    assert (output / "model.safetensors").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any, text: Path) -> bytes:
    """The weights of a run that nothing disturbs."""
    output = tmp_path_factory.mktemp("whole") / "out"
    prune(DEMO, output, calibration=text, **FAST)
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["full", "quota", "safetensors"],
)
def test_masks_that_do_not_fit(tmp_path: Path, monkeypatch: Any, error: Exception) -> None:
    real = safetensors.torch.save_file

    def save_file(tensors: Any, filename: str, **options: Any) -> None:
        if Path(filename).name == "proxsparse.masks":
            raise error
        real(tensors, filename, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(ProxsparseError, match=r"could not be written \(.*make room"):
        prune(DEMO, tmp_path / "out", method="magnitude")
    assert list(tmp_path.iterdir()) == []


def test_metrics_that_do_not_fit(tmp_path: Path, text: Path, monkeypatch: Any) -> None:
    import builtins

    real = open

    def full(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if str(path).endswith("metrics.jsonl") and mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, *args, **options)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(ProxsparseError, match=r"metrics.jsonl could not be written .*make room"):
        prune(DEMO, tmp_path / "out", calibration=text, **FAST)


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from proxsparse.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        f"sys.argv = ['proxsparse', 'prune', {str(DEMO)!r}, '--method', 'magnitude', '--output', "
        f"{str(tmp_path / 'out')!r}]\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert re.search(NO_ROOM, done.stderr) and list(tmp_path.iterdir()) == []
