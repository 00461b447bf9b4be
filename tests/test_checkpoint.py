"""Checkpoints: a write that fails, or a file that is broken, never costs the one before."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from proxsparse.errors import ProxsparseError
from proxsparse.learning.checkpoint import Checkpoints


def state(step: int) -> dict[str, Tensor]:
    return {
        "s": torch.full((3, 4), float(step)),
        "m": torch.arange(12.0).reshape(4, 3).T.bfloat16(),  # not contiguous
        "count": torch.tensor(step),
    }


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "run" / "checkpoints", "recipe-1")


def assert_latest_is(checkpoints: Checkpoints, step: int) -> None:
    found = checkpoints.latest()
    assert found is not None and found[0] == step
    assert found[1].keys() == state(step).keys()
    for name, tensor in state(step).items():
        assert found[1][name].dtype == tensor.dtype and torch.equal(found[1][name], tensor)


def test_nothing_yet(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() is None
    assert checkpoints.last_path() is None


def test_round_trip(checkpoints: Checkpoints) -> None:
    path = checkpoints.save(7, state(7))
    assert path == checkpoints.last_path() and path.is_file()
    assert_latest_is(checkpoints, 7)


def test_the_newest_two_are_kept(checkpoints: Checkpoints) -> None:
    # In the order of steps, also where the number of digits grows.
    for step in (0, 9, 10, 99, 100, 100_000):
        checkpoints.save(step, state(step))
        assert_latest_is(checkpoints, step)
    assert names(checkpoints.directory) == [
        "step-00000100.safetensors",
        "step-00100000.safetensors",
    ]


def test_the_same_step_again_replaces_it(checkpoints: Checkpoints) -> None:
    checkpoints.save(5, {"s": torch.zeros(1)})
    checkpoints.save(5, state(5))
    assert_latest_is(checkpoints, 5)
    assert names(checkpoints.directory) == ["step-00000005.safetensors"]


def fail_half_way(error: Exception) -> Callable[..., None]:
    def save_file(tensors: dict[str, Tensor], filename: str, **_: Any) -> None:
        Path(filename).write_bytes(b"half of it")
        raise error

    return save_file


FAILURES = [
    OSError(errno.ENOSPC, "No space left on device"),
    PermissionError(errno.EACCES, "Permission denied"),
    SafetensorError("I/O error: No space left on device"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
def test_a_failed_write_leaves_the_one_before(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    for step in (1, 2):
        checkpoints.save(step, state(step))
    before = names(checkpoints.directory)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fail_half_way(error))
        message = "step-00000003.*could not be written .*last good checkpoint is .*step-00000002"
        with pytest.raises(ProxsparseError, match=message) as raised:
            checkpoints.save(3, state(3))
    assert raised.value.__cause__ is error
    assert names(checkpoints.directory) == before  # nothing half written, nothing rotated away
    assert_latest_is(checkpoints, 2)
    checkpoints.save(3, state(3))
    assert_latest_is(checkpoints, 3)


def test_a_failed_first_write_says_that_there_is_none(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors.torch, "save_file", fail_half_way(FAILURES[0]))
    with pytest.raises(ProxsparseError, match=r"No space left.*there is no earlier one"):
        checkpoints.save(1, state(1))
    assert names(checkpoints.directory) == []


def test_killed_before_the_rename_leaves_the_one_before(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(1, state(1))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(2, state(2))
    assert_latest_is(checkpoints, 1)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_newest_falls_back_with_a_warning(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture, share: float
) -> None:
    checkpoints.save(1, state(1))
    newest = checkpoints.save(2, state(2))
    whole = newest.read_bytes()
    newest.write_bytes(whole[: int(share * len(whole))])
    with caplog.at_level(logging.WARNING, logger="proxsparse"):
        assert_latest_is(checkpoints, 1)
    (record,) = caplog.records
    assert f"checkpoint {newest} cannot be read" in record.getMessage()


def test_all_truncated_is_none(checkpoints: Checkpoints) -> None:
    for step in (1, 2):
        checkpoints.save(step, state(step)).write_bytes(b"")
    assert checkpoints.latest() is None


def test_another_recipe_is_refused(checkpoints: Checkpoints) -> None:
    path = checkpoints.save(1, state(1))
    other = Checkpoints(checkpoints.directory, "recipe-2")
    with pytest.raises(ProxsparseError, match=f"{path.name} was written by a run with another"):
        other.latest()
