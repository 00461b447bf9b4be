"""Block-by-block statistics equal those of the plain forward with the earlier blocks pruned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from proxsparse.learning.layerwise import Gram, InputNorm, collect_input_norms, prune_block_by_block
from proxsparse.models.observe import observe_inputs
from proxsparse.models.targets import find_targets
from proxsparse.ops import project_2to4


def tokens() -> torch.Tensor:
    return torch.randint(3, 96, (6, 16), generator=torch.Generator().manual_seed(0))


def test_statistics_see_pruned_earlier_blocks(tiny_model: Any, tiny_model_name: str) -> None:
    model = tiny_model(tiny_model_name)
    targets = find_targets(model)
    pruned: list[str] = []

    def prune(target: Any, seen: InputNorm) -> None:
        # What the model gives now, with the blocks before this one pruned and this one not yet
        # (its own layers are pruned only after all of them were observed).
        if not pruned or target.block != block_of[pruned[-1]]:
            layers = [t for t in targets.layers if t.block == target.block]
            sums = {t.name: InputNorm(t, torch.device("cpu")) for t in layers}
            with torch.no_grad(), observe_inputs(layers, lambda t, e, x: sums[t.name].add(e, x)):
                model(input_ids=tokens(), use_cache=False)
            expected.update({t.name: sums[t.name].sum for t in layers})
        torch.testing.assert_close(seen.sum, expected[target.name], rtol=1e-4, atol=1e-5)
        target.set_weight_(project_2to4(target.weight()))
        pruned.append(target.name)

    block_of = {t.name: t.block for t in targets.layers}
    expected: dict[str, torch.Tensor] = {}
    prune_block_by_block(model, targets, tokens(), InputNorm, prune)
    assert pruned == [t.name for t in sorted(targets.layers, key=lambda t: t.block)]
    assert all("forward" not in block.__dict__ for block in targets.blocks)
    assert all(not block._forward_hooks for block in targets.blocks)


def test_gram_is_the_sum_of_outer_products(tiny_model: Any) -> None:
    model = tiny_model("llama")
    targets = find_targets(model)
    inputs: dict[str, list[torch.Tensor]] = {t.name: [] for t in targets.layers}
    with torch.no_grad():
        with observe_inputs(targets.layers, lambda t, e, x: inputs[t.name].append(x.clone())):
            model(input_ids=tokens(), use_cache=False)

    def check(target: Any, seen: Gram) -> None:
        if target.block == 0:
            x = torch.cat(inputs[target.name]).double()
            torch.testing.assert_close(seen.sum.double(), x.T @ x, rtol=1e-4, atol=1e-5)

    prune_block_by_block(model, targets, tokens(), Gram, check)


def test_input_norms_are_relative_and_floored(tiny_model: Any) -> None:
    model = tiny_model("qwen3_moe")
    norms = collect_input_norms(model, find_targets(model), tokens())
    for name, norm in norms.items():
        assert norm.min() >= 1e-3, name
        torch.testing.assert_close(norm.mean(-1), torch.ones(norm.shape[:-1]), rtol=1e-2, atol=0.0)


def test_expert_without_tokens_is_ranked_by_magnitude(tiny_model: Any) -> None:
    target = find_targets(tiny_model("qwen3_moe")).layers[-1]
    seen = InputNorm(target, torch.device("cpu"))
    assert torch.equal(seen.norm(), torch.ones_like(seen.sum))


def test_lm_head_comes_last(tiny_model: Any) -> None:
    from proxsparse.config import TargetConfig

    model = tiny_model("llama")
    targets = find_targets(model, TargetConfig(targets=("lm_head", "q_proj")))
    order: list[str] = []
    prune_block_by_block(model, targets, tokens(), InputNorm, lambda t, seen: order.append(t.name))
    assert order[-1] == "lm_head" and len(order) == 3


def test_failure_leaves_no_hooks(tiny_model: Any) -> None:
    model = tiny_model("llama")
    targets = find_targets(model)
    with pytest.raises(IndexError):
        prune_block_by_block(model, targets, tokens() + 1000, InputNorm, lambda t, s: None)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all("forward" not in block.__dict__ for block in targets.blocks)
