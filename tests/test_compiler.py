"""Products of one input find together in a traced graph, and give what they give alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed

from proxsparse import ops, sparsify_
from proxsparse.inference.compiler import GroupProducts, compile_grouped
from proxsparse.inference.sparse_linear import SparseLinear
from proxsparse.models.targets import find_targets

PASS = "post_grad_custom_pre_pass"
GROUP = torch.ops.proxsparse.sparse_linear_group.default


def sparse(k: int, n: int, bias: bool = False) -> SparseLinear:
    linear = nn.Linear(k, n, bias=bias)
    linear.weight.data = ops.project_2to4(linear.weight.data)
    return SparseLinear.from_linear(linear)


def sizes_of_groups(run: Callable[..., Any], *inputs: Any) -> tuple[Any, list[int]]:
    """What the function gives after grouping, and how many products each of its groups has."""
    found = []

    def compile_functional(module: torch.fx.GraphModule, _: Any) -> Any:
        GroupProducts()(module.graph)
        module.graph.lint()
        module.recompile()
        groups = [node for node in module.graph.nodes if node.target is GROUP]
        found.extend(len(node.args[1]) for node in groups)
        assert all(len(node.meta["val"]) == len(node.args[1]) for node in groups)
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compile_functional)
    with torch.no_grad():
        return torch.compile(run, backend=backend, fullgraph=True)(*inputs), found


def keep_settings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings that Inductor gets from now on; graphs run as they are."""
    kept: list[dict[str, Any]] = []

    def compile_fx(module: Any, _: Any, config_patches: Any) -> Any:
        kept.append(config_patches)
        return module

    monkeypatch.setattr("proxsparse.inference.compiler.compile_fx", compile_fx)
    return kept


def test_products_of_one_input_become_one_call() -> None:
    q, k, v, out = sparse(16, 12, bias=True), sparse(16, 4), sparse(16, 4), sparse(4, 8)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        mixed = q(x).sum() + k(x)
        return out(v(x) * mixed), q(x + 1)

    x = torch.randn(3, 16)
    results, found = sizes_of_groups(run, x)
    assert found == [3]
    with torch.no_grad():
        for result, expected in zip(results, run(x), strict=True):
            assert torch.equal(result, expected)


def test_a_weight_that_is_made_in_between_stays_where_it_is() -> None:
    first, second = sparse(16, 8), sparse(16, 8)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y = first(x)
        bias = y.sum(0)
        return y, ops.sparse_linear(x, second.values, second.codes, bias)

    x = torch.randn(3, 16)
    results, found = sizes_of_groups(run, x)
    assert found == []
    assert torch.equal(results[1], run(x)[1])


def test_an_input_that_is_changed_in_place_is_another_one() -> None:
    first, second, third = sparse(16, 8), sparse(16, 8), sparse(16, 8)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        x = x.clone()
        y = first(x)
        x.add_(1)
        return y, second(x), third(x)

    x = torch.randn(3, 16)
    grouped, found = sizes_of_groups(run, x)
    assert found == [2]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(run, backend=compile_grouped, fullgraph=True)(x)
        for results in (grouped, compiled):
            for result, expected in zip(results, run(x), strict=True):
                torch.testing.assert_close(result, expected)


def test_the_blocks_of_a_model(tiny_model: Callable[[str], Any]) -> None:
    model = tiny_model("llama")
    for target in find_targets(model).layers:
        target.set_weight_(ops.project_2to4(target.weight()))
    sparsify_(model)
    x = torch.arange(10)[None]
    logits, found = sizes_of_groups(lambda x: model(x, use_cache=False).logits, x)
    assert found == [3, 2] * model.config.num_hidden_layers
    with torch.no_grad():
        torch.testing.assert_close(logits, model(x, use_cache=False).logits)


def test_with_gradients_the_graph_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = keep_settings(monkeypatch)
    a, b = sparse(16, 8, bias=True), sparse(16, 8)
    x = torch.randn(3, 16)
    torch._dynamo.reset()
    run = torch.compile(lambda x: a(x) + b(x), backend=compile_grouped)
    run(x).sum().backward()
    assert a.bias is not None and torch.equal(a.bias.grad, torch.full((8,), 3.0))
    with torch.no_grad():
        run(x)
    assert [PASS in settings for settings in kept] == [False, True]


def test_torch_knows_the_backend_by_name_with_its_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = keep_settings(monkeypatch)
    x = torch.randn(3)
    for how in ({}, {"mode": "reduce-overhead"}, {"options": {"max_autotune": True}}):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(lambda x: 2 * x, backend="proxsparse", **how)(x), 2 * x)
    assert kept == [{}, {"triton.cudagraphs": True}, {"max_autotune": True}]


def test_a_pass_in_the_place_of_its_own_is_refused() -> None:
    torch._dynamo.reset()
    options = {PASS: lambda graph: None}
    run = torch.compile(lambda x: 2 * x, backend="proxsparse", options=options)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="leave it out"):
        run(torch.randn(3))
