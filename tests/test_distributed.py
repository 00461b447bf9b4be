"""Several processes on CPU (gloo): the masks of one process, whatever their number."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import proxsparse
from proxsparse.errors import ProxsparseError
from proxsparse.jobs.prune import prune
from proxsparse.jobs.recover import recover
from proxsparse.models.masks import Masks

DEMO = Path(proxsparse.__file__).parent / "demo_model"
WORKER = Path(__file__).with_name("distributed_worker.py")
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "steps": 6,
    "batch_size": 4,
    "max_seq_length": 16,
    "checkpoint_every": 2,
}
# The server imports once; its children are there at once.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "transformers", "accelerate", "proxsparse.jobs.prune"])


def launch(
    config: Path, output: Path, world_size: int, die_at: int = 0, **settings: Any
) -> list[int | None]:
    """Run a job in `world_size` processes; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world_size):
        env = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        spec = {
            "env": env,
            "config": str(config),
            "output": str(output),
            "die_at": die_at,
            "settings": {**SETTINGS, **settings},
        }
        process = _CONTEXT.Process(
            target=runpy.run_path, args=(str(WORKER),), kwargs={"init_globals": {"spec": spec}}
        )
        process.start()
        processes.append(process)
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def codes(output: Path) -> dict[str, list[int]]:
    return {k: v.tolist() for k, v in Masks.load(output / "proxsparse.masks").codes.items()}


@pytest.fixture
def config(tiny_model: Any, tmp_path: Path) -> Any:
    """A factory: the config.json of a tiny model."""

    def make(name: str) -> Path:
        model = tiny_model(name)
        model.config.dtype = torch.float32
        model.config.save_pretrained(tmp_path / name)
        return tmp_path / name / "config.json"

    return make


@pytest.mark.parametrize(
    ("name", "world_size", "settings"),
    [
        ("llama", 2, {}),
        ("llama", 4, {}),
        ("gpt2", 2, {}),
        ("qwen3_moe", 2, {}),
        ("llama", 2, {"memory": "balanced"}),
        ("llama", 2, {"targets": ("lm_head", "mlp.down_proj")}),
        ("llama", 2, {"method": "proxsparse"}),
        ("llama", 2, {"method": "proxsparse", "lr": 0.01, "lam": 0.25}),
    ],
)
def test_masks_are_those_of_one_process(
    config: Any, tmp_path: Path, name: str, world_size: int, settings: dict[str, Any]
) -> None:
    path = config(name)
    prune(path, tmp_path / "one", random_init=True, **SETTINGS, **settings)
    assert launch(path, tmp_path / "several", world_size, **settings) == [0] * world_size
    assert codes(tmp_path / "several") == codes(tmp_path / "one")
    one, several = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "several")
    )
    assert [r["step"] for r in several] == [r["step"] for r in one]
    for a, b in zip(several, one, strict=True):
        for key in ("loss", "share_2to4", "share_flipped"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6)
    weights = "model.safetensors"
    assert (tmp_path / "several" / weights).read_bytes() == (
        tmp_path / "one" / weights
    ).read_bytes()


@pytest.mark.parametrize(
    ("name", "memory"), [("llama", "balanced"), ("gpt2", "fast"), ("qwen3_moe", "fast")]
)
def test_recovered_weights_are_those_of_one_process(
    tiny_model: Any, tmp_path: Path, name: str, memory: str
) -> None:
    base, pruned = tmp_path / "base", tmp_path / "pruned"
    tiny_model(name).save_pretrained(base)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(base)
    prune(base, pruned, method="magnitude", device="cpu")
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 96, (8, 16), generator=generator) for _ in range(3)]
    # So many that the weights move; at the default rate they hardly do in six steps.
    settings = {"calibration": tokens, "memory": memory, "lr": 0.1}
    recover(pruned, base, tmp_path / "one", **SETTINGS, **settings)
    assert launch(base, tmp_path / "several", 2, pruned=str(pruned), **settings) == [0, 0]
    before, one, several = (
        load_file(tmp_path / run / "model.safetensors") for run in ("pruned", "one", "several")
    )
    assert codes(tmp_path / "several") == codes(pruned)
    for key, w in one.items():
        change, difference = (w - before[key]).norm(), (w - several[key]).norm()
        assert difference <= 0.02 * change, key
        is_pruned = w.dim() > 1 and (before[key] == 0).float().mean() == 0.5
        assert bool(change > 0) == is_pruned, key
        assert torch.equal(several[key] == 0, w == 0)


@pytest.mark.parametrize(("before", "after"), [(2, 4), (2, 1), (1, 2)])
def test_a_killed_job_goes_on_with_another_number_of_processes(
    config: Any, tmp_path: Path, before: int, after: int, monkeypatch: Any
) -> None:
    path, output = config("llama"), tmp_path / "out"
    prune(path, tmp_path / "one", random_init=True, **SETTINGS)

    def run(world_size: int, **changes: Any) -> None:
        if world_size > 1:
            launch(path, output, world_size, **changes)
        else:
            changes.pop("die_at", None)
            prune(path, output, random_init=True, **SETTINGS, **changes)

    if before == 1:
        from proxsparse.learning import loop as learn

        class Killed(BaseException):
            pass

        step = learn._Run.step

        def die(self: Any, *args: Any) -> Any:
            if self.scalars.step == 5:
                raise Killed
            return step(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(learn._Run, "step", die)
            with pytest.raises(Killed):
                run(1)
    else:
        run(before, die_at=5)
        said = Path(f"{output}.error-0").read_text()
        assert said.startswith("ProcessLost: another process of this job ended")
        assert "--resume" in said
        Path(f"{output}.error-0").unlink()
    assert not output.exists()
    run(after, resume=True)
    assert codes(output) == codes(tmp_path / "one")
    steps = [
        json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [2, 4, 6]


def test_what_several_processes_cannot_do_is_refused(config: Any, tmp_path: Path) -> None:
    path = config("llama")
    for settings, message in (
        ({"batch_size": 3}, "--batch-size 3 cannot be shared out evenly to 2 processes"),
        ({"memory": "low"}, "--memory low is not possible"),
    ):
        launch(path, tmp_path / "out", 2, **settings)
        for rank in (0, 1):
            assert message in (tmp_path / f"out.error-{rank}").read_text()
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_wanda_runs_in_one_process(config: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ProxsparseError, match="method wanda runs in one process"):
        prune(config("llama"), tmp_path / "out", method="wanda", device="cpu")


@pytest.mark.slow
def test_torchrun_prints_once(config: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["proxsparse", "prune", str(config("llama")), "--random-init", "--device", "cpu"]
    command += ["--steps", "2", "--batch-size", "2", "--max-seq-length", "16", "--json"]
    result = subprocess.run(
        [*command, "--output", str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["recipe"]["steps"] == 2
    assert result.stderr.count("--memory fast takes about") == 1
