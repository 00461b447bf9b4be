"""A step as a CUDA graph: on a GPU the eager run bit by bit; elsewhere, what goes without one."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from proxsparse import ops
from proxsparse.config import LearnConfig
from proxsparse.errors import Interrupted
from proxsparse.learning import loop as learning
from proxsparse.learning import step_graph
from proxsparse.learning.checkpoint import Checkpoints
from proxsparse.learning.job import Job
from proxsparse.methods import METHODS, RECOVERY
from proxsparse.methods.recover import recover
from proxsparse.models.targets import find_targets
from proxsparse.ops import dispatch

LEARNED = [m.name for m in METHODS.values() if m.learned]
EAGER = step_graph._EAGER_STEPS


def learn(
    model: Any, method: str, directory: Path | None = None, **changes: Any
) -> tuple[dict[str, Any], list[Any]]:
    """The codes of the masks, and what is recorded but for time and memory."""
    tokens = torch.randint(0, 96, (6, 16), generator=torch.Generator().manual_seed(3))
    settings: dict[str, Any] = {"steps": 24, "batch_size": 2, "lr": 0.1, "lam": 2.0}
    job = Job(
        model=model,
        targets=find_targets(model),
        tokens=tokens,
        learn=LearnConfig(**{**settings, "memory": "fast", "checkpoint_every": 0}),
        options=METHODS[method].config(),
        checkpoints=None if directory is None else Checkpoints(directory, "recipe"),
        **changes,
    )
    masks = METHODS[method].run(job)
    keys = ("step", "loss", "lr", "share_2to4", "share_flipped")
    history = [tuple(record[key] for key in keys) for record in job.history]
    return {name: masks.codes[name].tolist() for name in masks}, history


@contextlib.contextmanager
def eager_steps(monkeypatch: Any) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(learning, "as_graph", lambda step, device: contextlib.nullcontext(step))
        yield


# -- on a GPU


@pytest.fixture
def replays(monkeypatch: Any) -> Iterator[list[int]]:
    """Grows by one with every replay. Attention is summed in the same order each time."""
    seen: list[int] = []
    replay = torch.cuda.CUDAGraph.replay

    def count(graph: Any) -> None:
        seen.append(1)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count)
    with sdpa_kernel(SDPBackend.MATH):
        yield seen


@pytest.mark.gpu
@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_graph_learns_what_eager_steps_learn(
    tiny_model: Any, name: str, method: str, monkeypatch: Any, replays: list[int]
) -> None:
    def model() -> Any:
        made = tiny_model(name).cuda()
        made.config.pad_token_id = None  # else GPT-2 looks for it in every batch
        return made

    with eager_steps(monkeypatch):
        eager = learn(model(), method)
    assert not replays
    assert learn(model(), method) == eager
    assert len(replays) == 24 - EAGER


@pytest.mark.gpu
def test_a_graph_recovers_what_eager_steps_recover(
    tiny_model: Any, monkeypatch: Any, replays: list[int]
) -> None:
    def recovered() -> dict[str, Tensor]:
        model = tiny_model("llama").cuda()
        tokens = torch.randint(0, 96, (6, 16), generator=torch.Generator().manual_seed(3))
        config = LearnConfig(steps=24, batch_size=2, lr=0.1, memory="fast", checkpoint_every=0)
        job = Job(model, find_targets(model), tokens, config, RECOVERY.config())
        masks = METHODS["magnitude"].run(job)
        weights = {t.name: ops.project_2to4(t.weight()) for t in job.targets.layers}
        return recover(job, masks, weights)

    with eager_steps(monkeypatch):
        eager = recovered()
    assert not replays
    found = recovered()
    assert all(torch.equal(found[name], eager[name]) for name in eager)
    assert len(replays) == 24 - EAGER


@pytest.mark.gpu
def test_a_resumed_graph_run_equals_an_undisturbed_one(
    tiny_model: Any, tmp_path: Path, replays: list[int]
) -> None:
    undisturbed = learn(tiny_model("llama").cuda(), "gates")
    steps = []

    def interrupt(record: dict[str, float]) -> None:
        steps.append(record["step"])
        if record["step"] == 10:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="after step 11 of 24"):
        learn(tiny_model("llama").cuda(), "gates", tmp_path, track=interrupt)
    assert steps == [10, 11]
    replays.clear()
    masks, history = learn(tiny_model("llama").cuda(), "gates", tmp_path, resume=True)
    assert masks == undisturbed[0]
    assert history[-1][2:4] == undisturbed[1][-1][2:4]
    assert len(replays) == 13 - EAGER


def wait_in_the_loss(patch: Any) -> None:
    loss = learning._Run.loss

    def waiting(run: Any, sample: Tensor) -> Any:
        compute = loss(run, sample)

        def wait(model: Any, tokens: Tensor) -> Tensor:
            value = compute(model, tokens)
            value.item()
            return value

        return wait

    patch.setattr(learning._Run, "loss", waiting)


def wait_in_an_update_while_captured(patch: Any) -> None:
    update = learning._Run.update

    def waiting(run: Any, target: Any, grad: Tensor) -> None:
        update(run, target, grad)
        if torch.cuda.is_current_stream_capturing() and len(run.updated) == 3:
            grad.sum().item()

    patch.setattr(learning._Run, "update", waiting)


@pytest.mark.gpu
@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize(
    ("wait", "reason"),
    [
        (wait_in_the_loss, r"the host waits for the GPU at .*test_step_graph\.py:\d+"),
        (wait_in_an_update_while_captured, "captur"),
    ],
)
def test_a_step_that_waits_for_the_gpu_stays_eager(
    tiny_model: Any,
    method: str,
    wait: Callable[[Any], None],
    reason: str,
    monkeypatch: Any,
    caplog: Any,
    replays: list[int],
) -> None:
    with eager_steps(monkeypatch):
        eager = learn(tiny_model("llama").cuda(), method)
    caplog.set_level(logging.INFO, "proxsparse")
    with monkeypatch.context() as patch:
        wait(patch)
        assert learn(tiny_model("llama").cuda(), method) == eager
    assert not replays
    (said,) = [r.getMessage() for r in caplog.records if "kernel by kernel" in r.getMessage()]
    assert re.search(reason, said)
    # And torch is in order: numbers can be drawn, and the next run is a graph.
    torch.rand(1, device="cuda")
    assert learn(tiny_model("llama").cuda(), method) == eager
    assert len(replays) == 24 - EAGER


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma2", "opt"])
def test_models_of_other_kinds_are_learned_either_way(tiny_model: Any, name: str) -> None:
    masks, history = learn(tiny_model(name).cuda(), "gates")
    assert masks and [record[0] for record in history] == [10, 20, 24]


# -- anywhere


class Replayed(step_graph._StepGraph):
    """What a graph does, done by the step itself: the same work on the same buffers."""

    recorded = 0

    def _record(self) -> Callable[[], Tensor]:
        Replayed.recorded += 1
        return lambda: self.step(*self.inputs)


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("place", [None, "model.py:7"])
def test_buffers_that_keep_their_place_change_nothing(
    tiny_model: Any, method: str, place: str | None, monkeypatch: Any, caplog: Any
) -> None:
    usual = learn(tiny_model("llama"), method)
    waits = [place] if place else []
    monkeypatch.setattr(step_graph, "_waits_of_the_host", lambda: contextlib.nullcontext(waits))
    monkeypatch.setattr(Replayed, "recorded", 0)
    monkeypatch.setattr(
        learning,
        "_launched_whole",
        lambda job, step: contextlib.nullcontext(Replayed(step, torch.device("cpu"))),
    )
    caplog.set_level(logging.INFO, "proxsparse")
    assert learn(tiny_model("llama"), method) == usual
    assert Replayed.recorded == (0 if place else 1)
    assert ("not as one CUDA graph: the host waits for the GPU at model.py:7" in caplog.text) == (
        place is not None
    )


def test_a_step_is_a_graph_only_on_one_gpu_and_in_fast_mode(
    tiny_model: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(learning, "as_graph", lambda step, device: str(device))

    class Model(torch.nn.Module):
        def __init__(self, *devices: str) -> None:
            super().__init__()
            self.devices = devices

        def parameters(self, recurse: bool = True) -> Any:
            return [SimpleNamespace(device=torch.device(d)) for d in self.devices]

    def launched(memory: Any, *devices: str) -> Any:
        job: Any = SimpleNamespace(model=Model(*devices), learn=LearnConfig(memory=memory))
        return learning._launched_whole(job, lambda batch, scalars: batch)

    assert launched("fast", "cuda:1", "cuda:1") == "cuda:1"
    for eager in (
        launched("fast", "cpu"),
        launched("fast", "cuda:0", "cuda:1"),
        launched("fast", "cuda:0", "cpu"),
        launched("balanced", "cuda:0"),
        launched("low", "cuda:0"),
    ):
        assert isinstance(eager, contextlib.nullcontext)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert isinstance(launched("fast", "cuda:0"), contextlib.nullcontext)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_tensors_are_as_good_as_floats(backend: str, kind: torch.dtype) -> None:
    if isinstance(found := dispatch.implementation("gate_update_", backend), str):
        pytest.skip(found)
    w0, grad, norm = torch.randn(4, 16), torch.randn(4, 16), torch.rand(16)
    numbers = {"step": 3.0, "lr": 0.125, "lam": 0.0625, "grad_scale": 0.5}

    def updated(scalars: Any) -> list[Tensor]:
        states = [torch.full((4, 16), x) for x in (0.5, 0.1, 0.2, 0.3, 0.1, 0.2)]
        with dispatch.use_backend(backend):
            ops.gate_update_(states[0], grad, w0, *states[1:3], norm, **scalars)
            ops.prox_adamw_(states[3], grad, *states[4:], **scalars)
        return states

    tensors = {name: torch.tensor(x, dtype=kind) for name, x in numbers.items()}
    for a, b in zip(updated(numbers), updated(tensors), strict=True):
        assert torch.equal(a, b)


def test_models_compute_the_same_when_told_that_blocks_are_whole(
    tiny_model: Any, tiny_model_name: str, monkeypatch: Any
) -> None:
    from transformers import masking_utils

    # A torch without CUDA has no such thing as a capture.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = tiny_model(tiny_model_name)
    tokens = torch.randint(3, 96, (2, 16))
    before = dict(vars(masking_utils))
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
        with step_graph._whole_sequences():
            assert torch.equal(model(input_ids=tokens, use_cache=False).logits, logits)
    assert dict(vars(masking_utils)) == before


@pytest.mark.parametrize("window", [None, 4])
def test_a_capture_takes_the_attention_kernels_of_a_run(
    tiny_model: Any, window: int | None, monkeypatch: Any
) -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = window
    tokens = torch.randint(3, 96, (2, 16))
    seen: list[bool] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def note(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["attn_mask"] is None)
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    with torch.no_grad(), step_graph._whole_sequences():
        logits = []
        for capturing in (False, True):
            monkeypatch.setattr(
                torch.cuda, "is_current_stream_capturing", lambda answer=capturing: answer
            )
            logits.append(model(input_ids=tokens, use_cache=False).logits)
    assert torch.equal(*logits)
    run, captured = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert run == captured
    assert all(run) == (window is None)
