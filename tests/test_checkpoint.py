"""Checkpoints: a write that fails, or a file that is broken, never costs the one before."""

from __future__ import annotations

import errno
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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


def restore(checkpoints: Checkpoints, steps: int = 10**6) -> tuple[int, dict[str, Tensor]]:
    found = {name: torch.zeros_like(x) for name, x in state(0).items()}
    return checkpoints.restore_(found, {name: 3 for name in found}, steps), found


def assert_latest_is(checkpoints: Checkpoints, step: int) -> None:
    done, found = restore(checkpoints)
    assert done == step
    for name, tensor in state(step).items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_nothing_yet(checkpoints: Checkpoints) -> None:
    assert restore(checkpoints)[0] == 0
    assert checkpoints.last_path() is None


def test_round_trip(checkpoints: Checkpoints) -> None:
    path = checkpoints.save(7, state(7))
    assert path == checkpoints.last_path() and path.is_file()
    assert_latest_is(checkpoints, 7)


def test_the_newest_two_are_kept(checkpoints: Checkpoints) -> None:
    # In the order of steps, also where the number of digits grows.
    for step in (1, 9, 10, 99, 100, 100_000):
        checkpoints.save(step, state(step))
        assert_latest_is(checkpoints, step)
    assert names(checkpoints.directory) == [
        "step-00000100.safetensors",
        "step-00100000.safetensors",
    ]


def test_the_same_step_again_replaces_it(checkpoints: Checkpoints) -> None:
    checkpoints.save(5, state(4))
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
    assert f"checkpoint {newest} cannot be used" in record.getMessage()


def test_all_truncated_is_refused(checkpoints: Checkpoints) -> None:
    for step in (1, 2):
        checkpoints.save(step, state(step)).write_bytes(b"")
    with pytest.raises(ProxsparseError, match=r"no checkpoint in .* can be used.*truncated"):
        restore(checkpoints)


def write(checkpoints: Checkpoints, number: int, tensors: dict[str, Tensor], **header: str) -> None:
    """A checkpoint as a stranger might have written it."""
    checkpoints.directory.mkdir(parents=True, exist_ok=True)
    metadata = {"step": str(number), "recipe": "recipe-1", **header}
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    path = checkpoints.directory / f"step-{number:08d}.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={k: v for k, v in metadata.items() if v})


FALSE = {
    "more steps than the run": ({"step": "99"}, "99"),
    "another step than its name": ({"step": "1"}, r"\[1\] steps"),
    "no step": ({"step": ""}, "step"),
    "a step that is no number": ({"step": "two"}, "step"),
    "a negative step": ({"step": "-2"}, "step"),
    "one part of two": ({"parts": "2"}, "parts"),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_false_header_is_refused_and_hides_nothing(checkpoints: Checkpoints, name: str) -> None:
    header, message = FALSE[name]
    write(checkpoints, 99 if header.get("step") == "99" else 2, state(2), **header)
    with pytest.raises(ProxsparseError, match=f"can be used; the newest: .*{message}"):
        restore(checkpoints, steps=4)
    checkpoints.save(1, state(1))
    assert restore(checkpoints, steps=4)[0] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"s": torch.zeros(4, 4)}, "s has 4 rows, not 3"),
        ({"s": torch.zeros(3, 5)}, r"s is \[3, 5\]"),
        ({"m": torch.zeros(3, 4)}, "m is .*float32, not .*bfloat16"),
        ({"count": torch.zeros(2, dtype=torch.int64)}, r"count is \[2\]"),
        ({"count": None}, "count"),
    ],
)
def test_tensors_of_another_kind_are_refused(
    checkpoints: Checkpoints, changes: dict[str, Any], message: str
) -> None:
    tensors = {k: v for k, v in {**state(2), **changes}.items() if v is not None}
    write(checkpoints, 2, tensors)
    with pytest.raises(ProxsparseError, match=f"can be used; the newest: .*{message}"):
        restore(checkpoints)


def write_parts(
    checkpoints: Checkpoints, number: int, parts: int, whole: dict[str, Tensor]
) -> Path:
    """A checkpoint as several processes write it: rows shared out, the rest in every part."""
    directory = checkpoints.directory / f"step-{number:08d}.sharded"
    directory.mkdir(parents=True)
    rows = -(-3 // parts)
    for part in range(parts):
        own = {
            name: (x[part * rows : (part + 1) * rows] if x.dim() >= 2 else x).contiguous()
            for name, x in whole.items()
        }
        header = {"step": str(number), "recipe": checkpoints.recipe}
        header |= {"part": str(part), "parts": str(parts)}
        path = directory / f"part-{part:05d}.safetensors"
        safetensors.torch.save_file(own, path, metadata=header)
    return directory


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_of_several_processes_are_put_together(checkpoints: Checkpoints, parts: int) -> None:
    write_parts(checkpoints, 2, parts, state(2))
    assert_latest_is(checkpoints, 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "part-00001.safetensors").unlink(),
        lambda d: (d / "part-00000.safetensors").unlink(),
        lambda d: (d / "part-00001.safetensors").write_bytes(b"x"),
        lambda d: (d / "part-00001.safetensors").rename(d / "part-00007.safetensors.tmp"),
        lambda d: (d / "part-00002.safetensors").write_bytes(
            (d / "part-00001.safetensors").read_bytes()
        ),
        lambda d: [path.unlink() for path in d.iterdir()],
    ],
)
def test_a_damaged_part_hides_nothing(checkpoints: Checkpoints, damage: Any) -> None:
    directory = write_parts(checkpoints, 2, 2, state(2))
    damage(directory)
    with pytest.raises(ProxsparseError, match="can be used; the newest: "):
        restore(checkpoints)
    checkpoints.save(1, state(1))
    assert_latest_is(checkpoints, 1)


def test_pickles_of_older_versions_are_refused_unread(checkpoints: Checkpoints) -> None:
    """`.metadata` of a .dcp directory was a pickle; this one would leave a trace if read."""
    trace = checkpoints.directory / "trace"

    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (trace,))

    old = checkpoints.directory / "step-00000002.dcp"
    old.mkdir(parents=True)
    (old / ".metadata").write_bytes(pickle.dumps(Attack()))
    (old / "proxsparse.json").write_text('{"step": "2", "recipe": "recipe-1"}')
    with pytest.raises(ProxsparseError, match=r"pickles.* can run any code: finish that run with"):
        restore(checkpoints)
    assert not trace.exists()


def test_a_disk_too_small_is_refused_before_the_first_step(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(free=150)  # the state is 48 + 24 + 8 bytes
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    checkpoints.check_room(state(1), 0)
    checkpoints.check_room(state(1), 1)
    with pytest.raises(ProxsparseError, match=r"room for 3 checkpoints needs .* make room"):
        checkpoints.check_room(state(1), 9)


def test_another_recipe_is_refused(checkpoints: Checkpoints) -> None:
    path = checkpoints.save(1, state(1))
    other = Checkpoints(checkpoints.directory, "recipe-2")
    with pytest.raises(ProxsparseError, match=f"{path.name} was written by a run with another"):
        restore(other)
