"""Each method against its formula, on small matrices where the formula can be written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from proxsparse.config import LearnConfig, SparseGPTOptions
from proxsparse.errors import ProxsparseError
from proxsparse.learning.job import Job
from proxsparse.methods import METHODS, get_method
from proxsparse.methods.sparsegpt import _prune_matrix
from proxsparse.models.masks import apply_masks_
from proxsparse.models.observe import observe_inputs
from proxsparse.models.targets import find_targets
from proxsparse.ops import mask_2to4


def make_job(model: Any, method: str, options: Any = None) -> Job:
    tokens = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(0))
    options = METHODS[method].config() if options is None else options
    learn = LearnConfig(steps=3, batch_size=2)
    return Job(model, find_targets(model), tokens, learn, options)


@pytest.mark.parametrize("method", METHODS)
def test_every_architecture(tiny_model: Any, tiny_model_name: str, method: str) -> None:
    model = tiny_model(tiny_model_name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    job = make_job(model, method)
    masks = METHODS[method].run(job)
    apply_masks_(model, masks)
    pruned = {t.parameter_name for t in job.targets.layers}
    for name, w in model.state_dict().items():
        if name not in pruned:
            assert torch.equal(w, before[name]), name
    for target in job.targets.layers:
        w, kept = target.weight(), masks[target.parameter_name]
        assert (w[~kept] == 0).all() and not w[~kept].signbit().any()
        if method != "sparsegpt":
            old = before[target.parameter_name]
            old = old.transpose(-1, -2) if target.transposed else old
            assert torch.equal(w[kept], old[kept])


def test_magnitude_keeps_the_largest(tiny_model: Any) -> None:
    model = tiny_model("gpt2")
    masks = METHODS["magnitude"].run(make_job(model, "magnitude"))
    conv = model.transformer.h[0].mlp.c_fc.weight  # stored [K, N]
    assert torch.equal(masks["transformer.h.0.mlp.c_fc.weight"], mask_2to4(conv.T.contiguous()))


def test_wanda_scores_weight_times_norm(tiny_model: Any) -> None:
    model = tiny_model("llama")
    job = make_job(model, "wanda")
    target = job.targets.layers[0]
    seen: list[torch.Tensor] = []
    with torch.no_grad(), observe_inputs([target], lambda t, e, x: seen.append(x.clone())):
        model(input_ids=job.tokens)
    score = target.weight().abs() * torch.cat(seen).norm(dim=0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    masks = METHODS["wanda"].run(job)
    assert torch.equal(masks[target.parameter_name], mask_2to4(score))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_sparsegpt_beats_masking_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    w = torch.randn(16, 32, generator=generator)
    new, mask = _prune_matrix(w, x.T @ x, 0.01, "w")
    assert (mask.reshape(-1, 4).sum(-1) == 2).all() and (new[~mask] == 0).all()

    def loss(candidate: torch.Tensor) -> float:
        return (x @ (candidate - w).T).square().mean().item()

    wanda = torch.where(mask_2to4(w.abs() * x.norm(dim=0)), w, 0.0)
    assert loss(new) < 0.7 * loss(wanda)
    assert loss(new) < 0.7 * loss(torch.where(mask, w, 0.0))


def test_sparsegpt_compensates_in_the_columns_that_follow() -> None:
    """When the first two of a group go, the last two must become their least-squares fit."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    x[:, 2] += x[:, 0]  # correlated, so that there is something to compensate
    x[:, 3] -= x[:, 1]
    w = torch.tensor([[0.1, 0.1, 1.0, -1.0]])
    new, mask = _prune_matrix(w, (x.T @ x).float(), 0.0, "w")
    assert mask[0].tolist() == [False, False, True, True]
    fit = torch.linalg.lstsq(x[:, 2:], x @ w[0].double()).solution
    torch.testing.assert_close(new[0, 2:].double(), fit, rtol=1e-4, atol=1e-5)
    assert (new[0, 2:] - w[0, 2:]).abs().min() > 0.01


def test_sparsegpt_dead_inputs_and_singular_hessian() -> None:
    w = torch.randn(8, 8)
    gram = torch.diag(torch.tensor([1.0, 0, 1, 1, 1, 1, 0, 1]))
    new, mask = _prune_matrix(w, gram, 0.01, "w")
    assert torch.isfinite(new).all() and (new[:, [1, 6]] == 0).all()
    assert (mask.reshape(-1, 4).sum(-1) == 2).all()
    with pytest.raises(ProxsparseError, match="cannot invert the Hessian of w"):
        _prune_matrix(w, -torch.eye(8), 0.0, "w")


@pytest.mark.parametrize("mask_only", [False, True])
def test_sparsegpt_updates_weights_unless_mask_only(tiny_model: Any, mask_only: bool) -> None:
    model = tiny_model("llama")
    job = make_job(model, "sparsegpt", SparseGPTOptions(mask_only=mask_only))
    target = job.targets.layers[0]
    before = target.weight().clone()
    masks = METHODS["sparsegpt"].run(job)
    kept = masks[target.parameter_name]
    assert torch.equal(target.weight()[kept], before[kept]) == mask_only
    assert METHODS["sparsegpt"].updates_weights(job.options) != mask_only


def test_unknown_method() -> None:
    with pytest.raises(ProxsparseError, match="unknown method 'sparse_gpt': choose one of gates"):
        get_method("sparse_gpt")
