"""The output directory: whose it is, who may write it, when it gets its name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from proxsparse.errors import ProxsparseError
from proxsparse.jobs.checks import MARKER, check_output
from proxsparse.jobs.output import check_output_fits, claim, output_directory


def partial_of(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def fill(output: Path, **options: Any) -> None:
    with output_directory(output, **options) as partial:
        (partial / "file").write_text("x")


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_result_holds_what_was_written_and_nothing_of_the_run(tmp_path: Path) -> None:
    with output_directory(tmp_path / "out") as partial:
        (partial / "checkpoints").mkdir()
        (partial / "checkpoints/step-00000001.safetensors").write_text("x")
        (partial / "file").write_text("x")
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == {"file"}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: (p.mkdir(), (p / "thesis.tex").write_text("mine")),
        lambda p: (p.mkdir(), (p / "checkpoints").mkdir(), (p / "checkpoints/a").write_text("m")),
        lambda p: p.write_text("mine"),
        lambda p: p.symlink_to(p.parent / "elsewhere"),
    ],
    ids=["directory", "checkpoints", "file", "link"],
)
def test_a_foreign_partial_is_never_touched(
    tmp_path: Path, make: Callable[[Path], Any], resume: bool
) -> None:
    partial = partial_of(tmp_path / "out")
    make(partial)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(ProxsparseError, match=r"out.partial exists and is no unfinished run"):
        fill(tmp_path / "out", resume=resume)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_what_a_killed_run_left_is_ours(tmp_path: Path) -> None:
    partial = partial_of(tmp_path / "out")
    for left in ((), (MARKER + ".tmp",)):
        partial.mkdir()
        for name in left:
            (partial / name).write_text("{")
        fill(tmp_path / "out")
        (tmp_path / "out/file").unlink()
    partial.mkdir()
    (partial / MARKER).write_text('{"pid": 1}')
    (partial / "model-00001-of-00009.safetensors").write_text("stale")
    fill(tmp_path / "out")
    assert names(tmp_path / "out") == {"file"}


def test_resuming_drops_the_half_written_result(tmp_path: Path) -> None:
    partial = partial_of(tmp_path / "out")
    partial.mkdir()
    (partial / MARKER).write_text("{}")
    (partial / "metrics.jsonl").write_text("{}")
    (partial / "model-00001-of-00009.safetensors").write_text("stale")
    fill(tmp_path / "out", resume=True)
    assert names(tmp_path / "out") == {"file", "metrics.jsonl"}


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"format": "other"}', '{"identity": 3}', '{"pid": "x"}', "[" * 9999]
)
def test_a_damaged_marker_is_one_sentence(tmp_path: Path, text: str) -> None:
    partial = partial_of(tmp_path / "out")
    partial.mkdir()
    (partial / MARKER).write_text(text)
    with pytest.raises(ProxsparseError, match=MARKER):
        fill(tmp_path / "out", resume=True)
    assert names(partial) == {MARKER}


def test_a_second_run_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    with output_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("first")
        with pytest.raises(ProxsparseError, match=rf"another run \(process {os.getpid()} on .*\)"):
            fill(tmp_path / "out")
        code = (
            "import sys; from proxsparse.jobs.output import output_directory\n"
            f"with output_directory({str(tmp_path / 'out')!r}, resume=True): pass"
        )
        other = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert "ProxsparseError: another run" in other.stderr
    assert (tmp_path / "out/file").read_text() == "first" and names(tmp_path) == {"out"}


def test_of_many_runs_at_once_one_wins(tmp_path: Path) -> None:
    start, outcomes, refusals = threading.Barrier(8), [], []

    def run(i: int) -> None:
        start.wait()
        try:
            with output_directory(tmp_path / "out") as partial:
                for part in range(20):
                    (partial / f"{part}").write_text(f"{i}")
            outcomes.append(i)
        except Exception as error:
            refusals.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = outcomes
    for error in refusals:
        assert isinstance(error, ProxsparseError), error
        assert "another run" in str(error) or "is not empty" in str(error)
    assert {path.read_text() for path in (tmp_path / "out").iterdir()} == {str(winner)}
    assert names(tmp_path) == {"out"}


def test_a_lock_of_a_killed_run_holds_nothing_up(tmp_path: Path) -> None:
    code = (
        "import os, signal; from proxsparse.jobs.output import output_directory\n"
        f"with output_directory({str(tmp_path / 'out')!r}): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert names(tmp_path) == {"out.partial", "out.partial.lock"}
    fill(tmp_path / "out")
    assert names(tmp_path) == {"out"}


def test_a_lock_file_with_contents_is_someone_elses(tmp_path: Path) -> None:
    (tmp_path / "out.partial.lock").write_text("mine")
    fill(tmp_path / "out")
    assert (tmp_path / "out.partial.lock").read_text() == "mine"


def test_identity_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(KeyError), output_directory(tmp_path / "out", resume=True) as partial:
        (partial / "checkpoints").mkdir()
        (partial / "checkpoints/step-00000001.safetensors").write_text("x")
        claim(partial, "one")
        raise KeyError
    with pytest.raises(ProxsparseError, match="another model, text or settings"):
        with output_directory(tmp_path / "out", resume=True) as partial:
            claim(partial, "two")
    with output_directory(tmp_path / "out", resume=True) as partial:
        assert (partial / "checkpoints/step-00000001.safetensors").read_text() == "x"
        claim(partial, "one")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.symlink_to(p.with_name("elsewhere")), "is a link"),
        (lambda p: (p.with_name("e").mkdir(), p.symlink_to(p.with_name("e"))), "is a link"),
        (lambda p: p.write_text("x"), "exists and is not empty"),
        (lambda p: (p.mkdir(), (p / "x").write_text("x")), "exists and is not empty"),
    ],
    ids=["dangling", "link", "file", "full"],
)
def test_what_cannot_be_replaced_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    make(tmp_path / "out")
    for check in (check_output, fill):
        with pytest.raises(ProxsparseError, match=message):
            check(tmp_path / "out")
    assert not partial_of(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("/", "give the name of a new directory|not empty"),
        ("", "give the name of a new directory"),
        ("a\0b", "cannot be made"),
        ("x" * 300, "cannot be made"),
        ("~nobody-of-this-name/out", "cannot be made"),
    ],
)
def test_names_that_are_none(tmp_path: Path, monkeypatch: Any, output: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProxsparseError, match=message):
        check_output(output)


def test_a_directory_that_may_not_be_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ProxsparseError, match="may not be written by this user"):
        fill(tmp_path / "deep/er/out")
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    "appear",
    [
        lambda p: p.write_text("x"),
        lambda p: (p.mkdir(), (p / "x").write_text("x")),
        lambda p: p.symlink_to(p.with_name("elsewhere")),
    ],
    ids=["file", "directory", "link"],
)
def test_what_appears_meanwhile_costs_no_result(
    tmp_path: Path, appear: Callable[[Path], Any]
) -> None:
    with pytest.raises(ProxsparseError, match=r"the finished result is .*out.partial; move"):
        with output_directory(tmp_path / "out") as partial:
            (partial / "file").write_text("x")
            appear(tmp_path / "out")
    assert (partial / "file").read_text() == "x"
    (tmp_path / "out").rename(tmp_path / "away")
    with pytest.raises(ProxsparseError, match="an unfinished run lies in"):  # not thrown away
        fill(tmp_path / "out")


def test_checkpoints_outlive_the_rename(tmp_path: Path, monkeypatch: Any) -> None:
    def killed(source: Any, target: Any) -> None:
        if Path(source).is_dir():
            raise KeyboardInterrupt
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt), output_directory(tmp_path / "out") as partial:
            (partial / "checkpoints").mkdir()
            (partial / "checkpoints/step-00000001.safetensors").write_text("x")
    assert (partial / "checkpoints/step-00000001.safetensors").exists()


def test_killed_between_rename_and_tidying(tmp_path: Path) -> None:
    fill(tmp_path / "out")
    (tmp_path / "out" / MARKER).write_text("{}")
    (tmp_path / "out/checkpoints").mkdir()
    with pytest.raises(ProxsparseError, match="exists and is not empty"):
        fill(tmp_path / "out")
    assert names(tmp_path / "out") == {"file"}  # tidied up, and kept


def test_every_file_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: Any) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with output_directory(tmp_path / "out") as partial:
        (partial / "sub").mkdir()
        (partial / "sub/file").write_text("x")
        synced.clear()
    assert {"file", "sub", "out.partial"} <= set(synced) and synced[-1] == tmp_path.name


def test_a_disk_too_small_for_the_result(tmp_path: Path, monkeypatch: Any) -> None:
    model = nn.Linear(1000, 1000, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    check_output_fits(tmp_path, model)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    with pytest.raises(ProxsparseError, match=r"the result needs 0.002 GB .*make room"):
        check_output_fits(tmp_path, model)


def test_marker_says_who(tmp_path: Path) -> None:
    with output_directory(tmp_path / "out") as partial:
        marker = json.loads((partial / MARKER).read_text())
        assert marker["pid"] == os.getpid() and not marker["finished"]
