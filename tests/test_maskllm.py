"""MaskLLM: its gradient is autograd's, its noise is noise, and its masks are learned."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from proxsparse.config import LearnConfig, MaskLLMOptions, SparseGPTOptions
from proxsparse.errors import ProxsparseError
from proxsparse.jobs.prune import prune
from proxsparse.learning.job import Job
from proxsparse.learning.rule import StepScalars
from proxsparse.methods import METHODS
from proxsparse.methods import maskllm as module
from proxsparse.models.masks import Masks
from proxsparse.models.targets import Target, find_targets
from proxsparse.ops import mask_2to4

MASKS = torch.tensor(
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]
)


def make_job(model: Any, **settings: Any) -> Job:
    tokens = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(0))
    learn = LearnConfig(**{"steps": 10, "batch_size": 2, **settings})
    return Job(model, find_targets(model), tokens, learn, MaskLLMOptions())


def make_rule(job: Job) -> tuple[Any, Masks]:
    prior = Masks()
    for t in job.targets.layers:
        prior.add(t, mask_2to4(t.weight()))
    return module._Categorical(job.learn, job.options, prior), prior


def scalars(step: int, lr: float, lam: float) -> StepScalars:
    return StepScalars(*(torch.tensor(x, dtype=torch.float64) for x in (step, lr, lam, 1.0)))


def test_a_step_is_adamw_on_the_gradient_of_the_soft_mask(tiny_model: Any) -> None:
    job = make_job(tiny_model("llama").double())
    rule, _ = make_rule(job)
    target = job.targets.layers[0]
    w0 = target.weight()
    state = rule.start(target, w0)
    logits = torch.nn.Parameter(state["logits"].clone())
    optimizer = torch.optim.AdamW(
        [logits], lr=1e-3, betas=rule.betas, eps=1e-12, weight_decay=module._WEIGHT_DECAY
    )
    direction = torch.randn(w0.shape, dtype=w0.dtype)
    lam = 0.3
    for step, (tau, kappa) in enumerate([(4.0, 100.0), (4 - 3.95 / 9, 100 + 400 / 9)]):
        uniform = ((module._hash(state, logits) >> 9) + 0.5) / 2**23
        gumbel = -(-uniform.double().log()).log()
        y = ((logits * kappa + gumbel) / tau).softmax(-1)
        mask = (y @ MASKS.double()).reshape(w0.shape)
        out = torch.empty_like(w0)
        rule.weight_(w0, state, out)
        torch.testing.assert_close(out, (w0 * mask).detach(), rtol=1e-6, atol=1e-9)
        # Of a loss with the gradient 3 * (w - direction) in the weight, less the regulariser.
        loss = 1.5 * (w0 * mask - direction).square().sum() - lam * (w0 * mask).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rule.update_(w0, state, 3 * (out - direction), scalars(step + 1, 1e-3, lam), out)
        torch.testing.assert_close(state["logits"], logits.detach(), rtol=1e-5, atol=1e-8)


def test_it_begins_at_the_prior_and_takes_the_largest_logit(tiny_model: Any) -> None:
    job = make_job(tiny_model("llama"))
    rule, prior = make_rule(job)
    target = job.targets.layers[0]
    w0 = target.weight()
    state = rule.start(target, w0)
    begun = mask_2to4(rule.score(w0, state, w0)).view(-1, 4)
    given = prior[target.parameter_name].view(-1, 4)
    # The prior is three standard deviations of the logits above masks that share one place.
    assert 0.85 < (begun == given).all(-1).float().mean() < 1.0
    state["logits"].zero_()
    state["logits"][..., 4] = 1e-3
    assert (
        mask_2to4(rule.score(w0, state, w0))
        .view(-1, 4)
        .equal(MASKS[4].bool().expand(w0.numel() // 4, 4))
    )


def test_masks_become_hard(tiny_model: Any) -> None:
    job = make_job(tiny_model("llama"))
    rule, _ = make_rule(job)
    target = job.targets.layers[0]
    state = rule.start(target, target.weight())

    def largest() -> float:
        return rule._probabilities(state).amax(-1).mean().item()

    soft = largest()
    state["step"].fill_(9)  # the last of ten
    assert rule._schedules(state)[0].item() == pytest.approx(0.05)
    assert rule._schedules(state)[1].item() == pytest.approx(500)
    assert soft < 0.7 and largest() > 0.99


def test_noise_is_uniform_and_of_its_own_in_each_step_layer_and_place() -> None:
    like = torch.empty(100_000)

    def draw(seed: int, step: int) -> torch.Tensor:
        state = {"seed": torch.tensor(seed), "step": torch.tensor(step)}
        bits = module._hash(state, like)
        assert bits.min() >= 0 and bits.max() < 2**32
        return bits.double() / 2**32

    rows = torch.stack([draw(seed, step) for seed in (0, 7, 2**32 - 1) for step in range(6)])
    assert torch.equal(rows[0], draw(0, 0))
    assert (rows.mean(1) - 0.5).abs().max() < 5 / (12 * 1e5) ** 0.5
    counts = torch.stack([torch.histc(row, 64, 0, 1) for row in rows])
    chi_square = ((counts - 1e5 / 64).square() / (1e5 / 64)).sum(1)
    assert (chi_square < 63 + 5 * (2 * 63) ** 0.5).all()
    correlations = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / 1e5**0.5
    for lag in (1, 6, 64):
        pairs = torch.corrcoef(torch.stack((rows[0, :-lag], rows[0, lag:])))
        assert pairs[0, 1].abs() < 5 / 1e5**0.5


def test_it_finds_the_masks_that_matter() -> None:
    """One layer, a loss that wants two of its weights kept, and a prior that has them pruned."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 16, bias=False)
    target = Target("", linear, "weight", "weight", 0, False, linear)
    w0 = target.weight()
    wanted = mask_2to4(torch.randn(16, 32))
    prior = Masks()
    prior.add(target, ~wanted)
    rule = module._Categorical(LearnConfig(steps=200), MaskLLMOptions(), prior)
    state = rule.start(target, w0)
    assert mask_2to4(rule.score(w0, state, w0))[wanted].float().mean() < 0.3
    out = torch.empty_like(w0)
    rule.weight_(w0, state, out)
    goal = torch.where(wanted, w0, 0.0)
    for step in range(200):
        rule.update_(w0, state, out - goal, scalars(step + 1, 1e-3, 0.0), out)
    found = mask_2to4(rule.score(w0, state, w0))
    assert (found == wanted).float().mean() > 0.9


@pytest.mark.parametrize("distil", [False, True])
def test_the_loss_is_the_published_one_unless_distilled(tiny_model: Any, distil: bool) -> None:
    model = tiny_model("llama")
    job = make_job(model, steps=1, lam=0.0)
    job.options = MaskLLMOptions(distil=distil)
    METHODS["maskllm"].run(job)
    loss = job.history[0]["loss"]
    # A random model is as good as uniform at 96 tokens, and near itself.
    assert loss < 0.5 if distil else loss == pytest.approx(torch.tensor(96.0).log().item(), abs=0.5)


def test_the_prior_is_sparsegpts_mask(tiny_model: Any) -> None:
    """With no steps to speak of, and logits that hardly differ from the prior, it comes out."""
    model = tiny_model("llama")
    job = make_job(model, steps=1, lr=0.0)
    found = METHODS["maskllm"].run(job)
    options = SparseGPTOptions(mask_only=True)
    prior = METHODS["sparsegpt"].run(dataclasses.replace(job, options=options))
    same = [(found[n].view(-1, 4) == prior[n].view(-1, 4)).all(-1).float().mean() for n in prior]
    assert min(same) > 0.8


def test_it_runs_in_one_process(tiny_model: Any, tmp_path: Any, monkeypatch: Any) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ProxsparseError, match="method maskllm runs in one process"):
        prune(tmp_path / "model", tmp_path / "out", method="maskllm", device="cpu")
