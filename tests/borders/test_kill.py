"""Killed at any moment, a command leaves nothing that looks finished and loses nothing.

Each attack starts a command in a process of its own, sends it a signal after a time or at a write
that a fixed seed draws, and runs it again, with --resume where it can. The files must be those of
an undisturbed run, bit by bit. A process costs seconds, so the usual set is small; `-m slow` has
more.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import proxsparse
from proxsparse.errors import Interrupted, ProxsparseError
from proxsparse.jobs.checks import MARKER
from proxsparse.jobs.pack import pack, unpack
from proxsparse.jobs.prune import apply, prune
from proxsparse.jobs.recover import recover
from proxsparse.models.masks import Masks

DEMO = Path(proxsparse.__file__).parent / "demo_model"
LEARN: dict[str, Any] = {"steps": 8, "batch_size": 2, "max_seq_length": 32, "checkpoint_every": 2}
# Of the report and the metrics only times and paths may differ.
VARYING = {"proxsparse.json", "metrics.jsonl", "training.png"}
# The server imports once; its children are there at once.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "transformers", "proxsparse.jobs.pack"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A text, and what each command makes of the demo model undisturbed."""
    folder: Path = tmp_path_factory.mktemp("kill")
    (folder / "text.txt").write_text(Path(json.__file__).read_text() * 2)
    for command in COMMANDS:
        run(command, folder, folder / command, False)
    return folder


def run(command: str, folder: Path, output: Path, resume: bool) -> None:
    text = folder / "text.txt"
    samples = {"num_calibration_samples": 8, "max_seq_length": 32}
    match command:
        case "gates" | "proxsparse":
            prune(DEMO, output, calibration=text, method=command, resume=resume, **LEARN)
        case "sparsegpt" | "wanda":
            prune(DEMO, output, calibration=text, method=command, resume=resume, **samples)
        case "recover":
            recover(folder / "wanda", DEMO, output, calibration=text, resume=resume, **LEARN)
        case "apply":
            apply(DEMO, folder / "gates/proxsparse.masks", output)
        case "pack":
            pack(folder / "gates", output)
        case "unpack":
            unpack(folder / "pack", output)


COMMANDS = ("gates", "proxsparse", "wanda", "sparsegpt", "recover", "apply", "pack", "unpack")
RESUMABLE = ("gates", "proxsparse", "wanda", "sparsegpt", "recover")


def victim(command: str, folder: str, output: str, resume: bool, number: int, at_call: int) -> None:
    """Run a command that sends itself a signal at the nth call that changes what is on the disk."""
    torch.set_num_threads(1)
    left = at_call

    def watched(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)
            return function(*args, **options)

        return call

    for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, watched(getattr(os, name)))
    with contextlib.suppress(Interrupted):
        run(command, Path(folder), Path(output), resume)


def attack(
    command: str,
    folder: Path,
    output: Path,
    *,
    number: int,
    at_call: int = 0,
    after: float = 0,
    times: int = 1,
) -> None:
    """Kill a command again and again, then let it finish; the result is the undisturbed one."""
    resume = False
    for _ in range(times):
        arguments = (command, str(folder), str(output), resume, number, at_call)
        process = _CONTEXT.Process(target=victim, args=arguments)
        process.start()
        if not at_call:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)
        process.join(120)
        assert process.exitcode is not None
        if output.exists():
            break
        partial = output.with_name(output.name + ".partial")
        resume = command in RESUMABLE and partial.exists()
    if not output.exists():
        run(command, folder, output, resume)
    elif (output / MARKER).exists():  # killed while it tidied up
        with pytest.raises(ProxsparseError, match="is not empty"):
            run(command, folder, output, resume)
    assert_same(folder / command, output)


def assert_same(expected: Path, found: Path) -> None:
    assert {p.name for p in found.iterdir()} == {p.name for p in expected.iterdir()}
    for path in expected.iterdir():
        if path.name == "proxsparse.masks":  # safetensors writes metadata in any order
            a, b = Masks.load(path), Masks.load(found / path.name)
            assert a.metadata == b.metadata and a.shapes == b.shapes
            assert all(torch.equal(a.codes[name], b.codes[name]) for name in a)
        elif path.name not in VARYING:
            text = (found / path.name).read_bytes()
            if path.name == "README.md":  # the card names the directory
                text = text.replace(found.name.encode(), expected.name.encode())
            assert text == path.read_bytes(), path.name
    if (expected / "metrics.jsonl").exists():
        assert records(found) == records(expected)


def records(output: Path) -> list[dict[str, float]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    varying = ("tokens_per_second", "memory_gb")
    return [{k: v for k, v in json.loads(x).items() if k not in varying} for x in lines]


def draws(seed: int, count: int, most: int) -> list[Any]:
    chance = random.Random(seed)
    return [
        (chance.choice(COMMANDS[:1] * 3 + COMMANDS[1:]), chance.randint(1, most))
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("command", "at_call"), [("gates", 9), ("wanda", 4), ("recover", 9), ("pack", 6)]
)
def test_killed_at_a_write(folder: Path, tmp_path: Path, command: str, at_call: int) -> None:
    attack(command, folder, tmp_path / "attacked", number=signal.SIGKILL, at_call=at_call)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_after_a_time(folder: Path, tmp_path: Path, number: int) -> None:
    attack("gates", folder, tmp_path / "attacked", number=number, after=1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "at_call"), draws(1, 100, 60))
def test_killed_at_more_writes(folder: Path, tmp_path: Path, command: str, at_call: int) -> None:
    attack(command, folder, tmp_path / "attacked", number=signal.SIGKILL, at_call=at_call, times=3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize(("command", "tenths"), draws(2, 30, 30))
def test_killed_after_more_times(
    folder: Path, tmp_path: Path, number: int, command: str, tenths: int
) -> None:
    attack(command, folder, tmp_path / "attacked", number=number, after=tenths / 10)


@pytest.mark.parametrize("torn", [b'{"step": 6, "lo', b"[]\n", b"\xff\xfe\n"])
def test_a_torn_line_of_metrics_does_not_stop_resuming(
    folder: Path, tmp_path: Path, torn: bytes
) -> None:
    output = tmp_path / "attacked"
    stop_at_step(output, folder, 5)
    metrics = output.with_name("attacked.partial") / "metrics.jsonl"
    with open(metrics, "ab") as file:
        file.write(torn)
    run("gates", folder, output, True)
    assert_same(folder / "gates", output)


def test_no_metrics_of_a_run_killed_before_its_first_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "attacked"
    stop_at_step(output, folder, 5)
    partial = output.with_name("attacked.partial")
    for path in (partial / "checkpoints").iterdir():
        path.unlink()
    assert (partial / "metrics.jsonl").read_text()
    run("gates", folder, output, True)
    assert_same(folder / "gates", output)


def stop_at_step(output: Path, folder: Path, step: int) -> None:
    """A run of gates that dies before it begins this step."""
    from proxsparse.learning import loop

    class Killed(BaseException):
        pass

    real = loop._Run.step

    def dying(self: Any, *args: Any) -> Any:
        if self.scalars.step == step:
            raise Killed
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "step", dying)
        with pytest.raises(Killed):
            run("gates", folder, output, False)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_no_method_takes_over_the_run_of_another(folder: Path, tmp_path: Path, method: str) -> None:
    output = tmp_path / "attacked"
    stop_at_step(output, folder, 5)
    before = sorted(str(p) for p in output.with_name("attacked.partial").rglob("*.safetensors"))
    assert before
    with pytest.raises(ProxsparseError, match="another model, text or settings"):
        run(method, folder, output, True)
    assert (
        sorted(str(p) for p in output.with_name("attacked.partial").rglob("*.safetensors"))
        == before
    )
    run("gates", folder, output, True)
    assert_same(folder / "gates", output)
