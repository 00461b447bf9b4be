"""The loop: order of the data, schedule, checkpoints, resumption, interruption, NaN."""

from __future__ import annotations

import dataclasses
import importlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from proxsparse import ops
from proxsparse.config import LearnConfig, TargetConfig
from proxsparse.errors import Interrupted, ProxsparseError
from proxsparse.learning import loop as learning
from proxsparse.learning.batch_order import BatchOrder
from proxsparse.learning.checkpoint import Checkpoints
from proxsparse.learning.job import Job
from proxsparse.learning.layerwise import collect_input_norms
from proxsparse.learning.rule import StepScalars
from proxsparse.methods import METHODS
from proxsparse.models.targets import find_targets

proxsparse_method: Any = importlib.import_module("proxsparse.methods.proxsparse")
LEARNED = [m.name for m in METHODS.values() if m.learned]
MODES = [(m.name, memory) for m in METHODS.values() for memory in m.memory]


def make_job(model: Any, method: str, directory: Path | None = None, **changes: Any) -> Job:
    tokens = torch.randint(0, 96, (6, 16), generator=torch.Generator().manual_seed(3))
    defaults: dict[str, Any] = {"steps": 6, "batch_size": 2, "lr": 0.1, "lam": 2.0}
    config = LearnConfig(**{**defaults, "checkpoint_every": 2, **changes})
    return Job(
        model=model,
        targets=find_targets(model),
        tokens=tokens,
        learn=config,
        options=METHODS[method].config(),
        checkpoints=None if directory is None else Checkpoints(directory / "checkpoints", "recipe"),
        metrics=None if directory is None else directory / "metrics.jsonl",
    )


def codes(masks: Any) -> dict[str, Any]:
    return {name: masks.codes[name].tolist() for name in masks}


@pytest.mark.parametrize(("method", "memory"), MODES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_leaves_model_as_it_was_and_is_deterministic(
    tiny_model: Any, method: str, memory: str, name: str
) -> None:
    model = tiny_model(name).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    job = make_job(model, method, memory=memory)
    first = METHODS[method].run(job)
    assert set(first) == {t.parameter_name for t in job.targets.layers}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert {k: p.requires_grad for k, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert codes(METHODS[method].run(make_job(model, method, memory=memory))) == codes(first)
    for mask in first.values():
        assert (mask.reshape(-1, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("method", LEARNED)
def test_learning_changes_masks(tiny_model: Any, method: str) -> None:
    model = tiny_model("llama")
    magnitude = METHODS["magnitude"].run(make_job(model, "magnitude"))
    assert codes(METHODS[method].run(make_job(model, method))) != codes(magnitude)


@pytest.mark.parametrize(("method", "memory"), MODES)
@pytest.mark.parametrize("killed_after", [2, 5])
def test_resumed_run_equals_undisturbed_one(
    tiny_model: Any, tmp_path: Path, method: str, memory: str, killed_after: int, monkeypatch: Any
) -> None:
    undisturbed = METHODS[method].run(make_job(tiny_model("llama"), method, memory=memory))

    class Killed(BaseException):
        pass

    classes = {"gates": "_Gates", "proxsparse": "_ProxAdamW", "maskllm": "_Categorical"}
    rule_class = classes[method]
    module = __import__(f"proxsparse.methods.{method}", fromlist=[rule_class])
    update = getattr(module, rule_class).update_

    def die(self: Any, w0: Any, state: Any, grad: Any, scalars: Any, out: Any) -> None:
        if scalars.step > killed_after:
            raise Killed
        update(self, w0, state, grad, scalars, out)

    with monkeypatch.context() as patch:
        patch.setattr(getattr(module, rule_class), "update_", die)
        with pytest.raises(Killed):
            METHODS[method].run(make_job(tiny_model("llama"), method, tmp_path, memory=memory))
    job = make_job(tiny_model("llama"), method, tmp_path, memory=memory)
    job.resume = True
    assert codes(METHODS[method].run(job)) == codes(undisturbed)
    steps = [json.loads(line)["step"] for line in job.metrics.read_text().splitlines()]
    assert steps == [2, 4, 6]
    assert [record["step"] for record in job.history] == steps


def after_the_loss(monkeypatch: Any, change: Any) -> None:
    """Let `change` have the value of each step's loss, and give another."""
    loss = learning._Run.loss

    def changed(run: Any, sample: Any) -> Any:
        compute = loss(run, sample)
        return lambda model, tokens: change(compute(model, tokens))

    monkeypatch.setattr(learning._Run, "loss", changed)


def test_interrupt_saves_and_says_how_to_go_on(
    tiny_model: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    calls = []

    def interrupt(value: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return value

    after_the_loss(monkeypatch, interrupt)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"after step 3 of 6.*step-00000003.*--resume"):
        METHODS["gates"].run(make_job(tiny_model("llama"), "gates", tmp_path))
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(Interrupted, match="nothing was saved"):
        calls.clear()
        METHODS["gates"].run(make_job(tiny_model("llama"), "gates"))


def test_nan_names_step_and_checkpoint(tiny_model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    calls = []

    def poisoned(value: Any) -> Any:
        calls.append(1)
        return value * (float("nan") if len(calls) == 5 else 1.0)

    after_the_loss(monkeypatch, poisoned)
    with pytest.raises(ProxsparseError, match=r"nan at step 5.*step-00000004"):
        METHODS["gates"].run(make_job(tiny_model("llama"), "gates", tmp_path))


@pytest.mark.parametrize("rise", [0.5, 1.5])
def test_a_run_that_diverges_is_no_result(tiny_model: Any, monkeypatch: Any, rise: float) -> None:
    calls = []

    def rising(value: Any) -> Any:
        calls.append(1)
        return value * 0 + 2.0 + (rise if len(calls) > 2 else 0.0)

    after_the_loss(monkeypatch, rising)
    job = make_job(tiny_model("llama"), "gates")
    monkeypatch.setattr(learning, "_METRICS_EVERY", 2)
    if rise < 1:
        METHODS["gates"].run(job)
        return
    with pytest.raises(ProxsparseError, match=r"2\.000 in the first.*3\.500 at step 4 of 6.*--lr"):
        METHODS["gates"].run(job)


@pytest.mark.parametrize("memory", METHODS["gates"].memory)
@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", ()), ("gpt2", ()), ("gemma2", ()), ("llama", ("lm_head", "down_proj", "q_proj"))],
)
def test_the_first_loss_is_the_divergence_of_wandas_mask(
    tiny_model: Any, name: str, targets: tuple[str, ...], memory: str
) -> None:
    """So the dense model is W0 in every mode of memory, its head included."""
    model = tiny_model(name)
    with torch.no_grad():
        for p in model.parameters():  # a model that has something to say
            p.mul_(8 if p.dim() > 1 else 1)
    job = make_job(model, "gates", memory=memory, steps=1)
    job.targets = find_targets(model, TargetConfig(targets=targets))
    batch = job.tokens[BatchOrder(6, 2, 0).indices(0)]
    norms = collect_input_norms(model, job.targets, job.tokens)
    METHODS["gates"].run(job)
    with torch.no_grad():
        dense = model(input_ids=batch).logits.log_softmax(-1)
        for t in job.targets.layers:
            w = t.weight()
            w.copy_(ops.project_2to4(w, w.abs() * norms[t.name].unsqueeze(-2)))
        pruned = model(input_ids=batch).logits.log_softmax(-1)
    expected = (dense.exp() * (dense - pruned)).sum(-1).mean().item()
    assert expected > 0.01
    assert job.history[0]["loss"] == pytest.approx(expected, rel=1e-3)


def rule_of(**settings: Any) -> Any:
    options = METHODS["proxsparse"].config()
    return proxsparse_method._ProxAdamW(LearnConfig(steps=10, **settings), options)


@pytest.mark.parametrize("scale", [1e-3, 0.02, 40.0])
def test_proxsparse_has_no_units_by_default(tiny_model: Any, scale: float) -> None:
    """A layer of other scale takes the same steps, relative to its weights."""
    learned = []
    for factor in (1.0, scale):
        target = find_targets(tiny_model("llama")).layers[0]
        target.weight().mul_(factor / target.weight().square().mean().sqrt())
        w0, rule = target.weight().clone(), rule_of()
        state = rule.start(target, w0)
        generator = torch.Generator().manual_seed(5)
        for step in range(1, 11):
            lr, lam = rule.lr, rule.lam_at(step / 11, rule.lr)
            scalars = (torch.tensor(float(x), dtype=torch.float64) for x in (step, lr, lam))
            grad = torch.randn(w0.shape, generator=generator)
            rule.update_(w0, state, grad, StepScalars(*scalars, torch.ones(())), None)
        learned.append(state["p"] / factor)
    assert not torch.allclose(learned[0], w0 / scale, rtol=0.05)
    torch.testing.assert_close(learned[0], learned[1], rtol=1e-3, atol=1e-4)


def test_proxsparse_with_lam_is_the_published_method() -> None:
    published, own = rule_of(lam=0.25), rule_of()
    assert published.lr == 1e-4 and published.lam_at(0.0, 1e-4) == 0.25
    assert not published.distils and own.distils
    assert own.lam_at(0.0, own.lr) == 0.0 < own.lam_at(0.9, own.lr)


def test_layer_without_gradient_is_named(tiny_model: Any) -> None:
    model = tiny_model("llama")
    layer = model.model.layers[1].mlp
    layer.forward = lambda x: torch.zeros_like(x)
    with pytest.raises(ProxsparseError, match=r"layers\.1\.mlp\.\w+ took no part in the loss"):
        METHODS["proxsparse"].run(make_job(model, "proxsparse"))


def test_history_counts_groups_that_are_2to4(tiny_model: Any) -> None:
    job = make_job(tiny_model("llama"), "gates", steps=30, checkpoint_every=0, lam=5.0)
    METHODS["gates"].run(job)
    shares = [record["share_2to4"] for record in job.history]
    assert 0 < job.history[0]["share_flipped"] < 0.5
    assert [record["step"] for record in job.history] == [10, 20, 30]
    assert shares[0] < shares[-1] and shares[-1] > 0.9


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_counts_are_the_same_layer_by_layer(tiny_model: Any, name: str, monkeypatch: Any) -> None:
    def shares() -> list[tuple[float, float]]:
        job = make_job(tiny_model(name), "gates", steps=20, checkpoint_every=5, lam=20.0)
        METHODS["gates"].run(job)
        return [(record["share_2to4"], record["share_flipped"]) for record in job.history]

    together = shares()
    assert len(learning._parts(find_targets(tiny_model(name)).layers)) == 1
    monkeypatch.setattr(learning, "_COUNTED_AT_ONCE", 1)
    assert len(learning._parts(find_targets(tiny_model(name)).layers)) > 1
    assert shares() == together


def test_schedule_warms_up_and_decays() -> None:
    lrs = [learning._schedule(t, 400) for t in range(400)]
    assert lrs[0] == 1 / 40 and lrs[39] == 1.0 and max(lrs) == 1.0
    assert lrs[-1] == pytest.approx(1 / 360)
    assert [learning._schedule(t, 1) for t in range(1)] == [1.0]


def test_every_block_once_per_epoch() -> None:
    order = BatchOrder(num_samples=6, batch_size=4, seed=1)
    seen = torch.cat([order.indices(t) for t in range(3)]).tolist()
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]
    fresh = BatchOrder(num_samples=6, batch_size=4, seed=1)
    assert fresh.indices(2).tolist() == seen[8:]


def test_steps_of_zero_is_refused() -> None:
    with pytest.raises(ProxsparseError, match="--steps is 0: it must be at least 1"):
        LearnConfig(steps=0)
    assert dataclasses.asdict(LearnConfig())["steps"] == 400
