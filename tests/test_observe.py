"""The observed inputs are the ones the layers multiply, and observing leaves no trace."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from proxsparse.config import TargetConfig
from proxsparse.errors import ProxsparseError
from proxsparse.models.observe import observe_inputs
from proxsparse.models.targets import Target, find_targets

TOKENS = 18


def _input_ids() -> Tensor:
    return torch.randint(3, 96, (2, TOKENS // 2))


class _Record:
    """Inputs by target name, and by expert within it."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[int | None, Tensor]] = defaultdict(dict)

    def __call__(self, target: Target, expert: int | None, x: Tensor) -> None:
        assert expert not in self.calls[target.name], "one forward, one call"
        assert not x.requires_grad
        assert x.shape[1:] == target.shape[-1:]
        self.calls[target.name][expert] = x.clone()


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_inputs_of_linear_layers(tiny_model, tiny_model_name):
    """x @ weight().T + bias is what the layer put out; outputs of the model do not change."""
    model, input_ids = tiny_model(tiny_model_name), _input_ids()
    targets = [t for t in find_targets(model).layers if len(t.shape) == 2]
    outputs: dict[str, Tensor] = {}
    handles = [
        t.module.register_forward_hook(
            lambda _, __, y, name=t.name: outputs.update(
                {name: y.clone()}
            )  # some add to it in place
        )
        for t in targets
    ]
    expected, record = model(input_ids).logits, _Record()
    for requires_grad in (False, True):
        record.calls.clear()
        with torch.set_grad_enabled(requires_grad), observe_inputs(targets, record):
            observed = model(input_ids).logits
    torch.testing.assert_close(observed, expected)
    assert list(record.calls) and set(record.calls) <= {t.name for t in targets}
    for target in targets:
        if target.name not in record.calls:  # transformers 4: an expert without tokens
            assert "experts" in target.name
            continue
        y = record.calls[target.name][None] @ target.weight().T
        y = y if target.module.bias is None else y + target.module.bias
        torch.testing.assert_close(y, outputs[target.name].reshape(y.shape))
    for handle in handles:
        handle.remove()
    assert _hooks(model) == 0


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4", "jetmoe"])
def test_inputs_of_experts(tiny_model, name):
    """What each expert's second layer sees follows from what its first layer was seen to get."""
    model, record = tiny_model(name), _Record()
    targets = {t.name: t for t in find_targets(model).layers if len(t.shape) == 3}
    if not targets:
        pytest.skip("this transformers stores the experts as linear layers")
    with torch.no_grad(), observe_inputs(tuple(targets.values()), record):
        model(_input_ids())
    assert set(record.calls) == set(targets)
    routed = 4 * TOKENS if name == "llama4" else 2 * TOKENS  # llama4 runs all experts on all tokens
    for calls in record.calls.values():
        assert sum(len(x) for x in calls.values()) == routed
    for first in (n for n in targets if n.endswith("gate_up_proj")):
        last = first.replace("gate_up_proj", "down_proj")
        experts = targets[first].module
        for expert, x in record.calls[first].items():
            y = x @ targets[first].weight()[expert].T
            if name == "gpt_oss":
                y = y + experts.gate_up_proj_bias[expert]
                gate = y[:, ::2].clamp(max=experts.limit)
                up = y[:, 1::2].clamp(-experts.limit, experts.limit)
                hidden = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
            else:
                gate, up = y.chunk(2, dim=-1)
                hidden = experts.act_fn(gate) * up
            torch.testing.assert_close(record.calls[last][expert], hidden)


@pytest.mark.skipif(transformers.__version__ < "5", reason="experts took other arguments before")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_output_of_experts_from_observed_inputs(tiny_model, name):
    """Adding up the experts' outputs, recomputed and weighted, gives the output of their module."""
    model, record = tiny_model(name), _Record()
    down = next(t for t in find_targets(model).layers if t.name.endswith("down_proj"))
    seen: list[Any] = []
    down.module.register_forward_hook(lambda _, args, y: seen.append((*args[1:], y)))
    with torch.no_grad(), observe_inputs([down], record):
        model(_input_ids())
    indices, weights, expected = seen[0]
    total = torch.zeros_like(expected)
    for expert, x in record.calls[down.name].items():
        choice, token = torch.where((indices == expert).T)
        y = x @ down.weight()[expert].T
        y = y + down.module.down_proj_bias[expert] if name == "gpt_oss" else y
        total.index_add_(0, token, y * weights[token, choice, None])
    torch.testing.assert_close(total, expected)


def test_experts_without_tokens_are_not_an_error(tiny_model):
    model, record = tiny_model("mixtral"), _Record()
    with torch.no_grad(), observe_inputs(find_targets(model).layers, record):
        model(torch.tensor([[5]]))
    experts = [calls for calls in record.calls.values() if None not in calls]
    assert all(len(calls) == 2 for calls in experts)


def test_head_and_router_by_name(tiny_model):
    model, record = tiny_model("qwen3_moe"), _Record()
    targets = find_targets(model, TargetConfig(targets=("lm_head", "gate"))).layers
    with torch.no_grad(), observe_inputs(targets, record):
        logits = model(_input_ids()).logits
    assert len(targets) == len(record.calls) == 3
    assert all(len(calls[None]) == TOKENS for calls in record.calls.values())
    torch.testing.assert_close(
        record.calls["lm_head"][None] @ targets[-1].weight().T, logits.flatten(0, 1)
    )


def test_a_shared_weight_is_observed_everywhere(tiny_model):
    model, inputs = tiny_model("llama"), []
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    target = next(t for t in find_targets(model).layers if t.module is first)
    with torch.no_grad(), observe_inputs([target], lambda _, __, x: inputs.append(x)):
        model(_input_ids())
    assert len(inputs) == 2


def test_follows_parameters_that_move(tiny_model):
    """A parameter is recognised by where it lies during the forward, not when observing began."""
    model, record = tiny_model("gpt_oss"), _Record()
    with torch.no_grad(), observe_inputs(find_targets(model).layers, record):
        model.to(torch.float64)
        model(_input_ids())
    assert all(x.dtype == torch.float64 for calls in record.calls.values() for x in calls.values())


@pytest.mark.parametrize("raise_in", ["callback", "forward"])
def test_an_error_leaves_no_trace(tiny_model, raise_in):
    model, input_ids = tiny_model("qwen3_moe"), _input_ids()
    implementation = getattr(model.config, "_experts_implementation", None)
    targets = find_targets(model).layers
    calls: list[str] = []

    def callback(target: Target, expert: int | None, x: Tensor) -> None:
        calls.append(target.name)
        if raise_in == "callback" and "experts" in target.name:
            raise RuntimeError("stop")

    if raise_in == "forward":
        model.model.layers[1].mlp.forward = None
    expectation = pytest.raises(RuntimeError if raise_in == "callback" else TypeError)
    with expectation, torch.no_grad(), observe_inputs(targets, callback):
        if implementation is not None:
            assert model.config._experts_implementation == "eager"
        model(input_ids)
    assert _hooks(model) == 0
    assert getattr(model.config, "_experts_implementation", None) == implementation
    before = len(calls)
    with contextlib.suppress(TypeError):
        model(input_ids)
    assert len(calls) == before


@pytest.mark.parametrize(
    ("name", "module", "replacement", "missed"),
    [
        (
            "gpt_oss",
            "mlp.experts",
            lambda x, *_, **__: x,
            r"experts\.gate_up_proj could be .*\(2 such",
        ),
        ("gpt_oss", "mlp", lambda x: (x, None), r"experts\.gate_up_proj could be .*\(2 such"),
        ("llama", "mlp", lambda x: x, r"mlp\.gate_proj could be observed \(3 such"),
    ],
)
def test_a_target_that_is_not_seen_is_an_error(tiny_model, name, module, replacement, missed):
    """As with a fused kernel in place of a module's forward."""
    model = tiny_model(name)
    model.model.layers[0].get_submodule(module).forward = replacement
    with (
        pytest.raises(ProxsparseError, match=missed),
        torch.no_grad(),
        observe_inputs(find_targets(model).layers, _Record()),
    ):
        model(_input_ids())
    assert _hooks(model) == 0


def test_nothing_run_is_not_an_error(tiny_model):
    with observe_inputs(find_targets(tiny_model("gpt_oss")).layers, _Record()):
        pass


class _Experts(nn.Module):
    """Three experts [3, 8, 4] applied by a function of (weight, x)."""

    def __init__(self, apply: Any, shape: tuple[int, ...] = (3, 8, 4)) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.apply_experts = apply

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_experts(self.w, x)

    def target(self, transposed: bool = False) -> Target:
        return Target("w", self, "w", "w", 0, transposed, self)


X = torch.arange(20.0).reshape(5, 4)


@pytest.mark.parametrize(
    ("apply", "experts"),
    [
        (lambda w, x: F.linear(x, w[1]), [1]),
        (lambda w, x: F.linear(input=x, weight=w[2]), [2]),
        (lambda w, x: x @ w[1].T, [1]),
        (lambda w, x: torch.mm(x, w[0].T), [0]),
        (lambda w, x: x.matmul(other=w[0].T), [0]),
        (lambda w, x: w[1] @ x.T, [1]),
        (lambda w, x: F.linear(x[None], w[1]), [1]),
        (lambda w, x: torch.bmm(x.expand(3, 5, 4), w.mT), [0, 1, 2]),
        (lambda w, x: w @ x.T, [0, 1, 2]),
        (lambda w, x: torch.bmm(x.expand(2, 5, 4), w[1:].mT), [1, 2]),
        (lambda w, x: (F.linear(x, w[1, :4]), F.linear(x, w[1, 4:])), [1]),  # used in two parts
        (lambda w, x: [F.linear(x, part) for part in w.unbind()], [0, 1, 2]),
    ],
)
def test_products_that_are_recognised(apply, experts):
    module, record = _Experts(apply), _Record()
    with torch.no_grad(), observe_inputs([module.target()], record):
        module(X)
    assert sorted(record.calls["w"]) == experts
    assert all(torch.equal(x, X) for x in record.calls["w"].values())


def test_parameters_that_share_a_storage():
    """As in a flattened checkpoint: the place within the storage tells them apart."""
    flat = torch.randn(2, 3, 8, 4)
    module = _Experts(lambda w, x: (F.linear(x, w[1]), F.linear(-x, flat[1, 2])))
    module.w = nn.Parameter(flat[0])
    module.other = nn.Parameter(flat[1])
    other, record = Target("other", module, "other", "other", 0, False, module), _Record()
    with torch.no_grad(), observe_inputs([module.target(), other], record):
        module(X)
    assert torch.equal(record.calls["w"][1], X) and len(record.calls["w"]) == 1
    assert torch.equal(record.calls["other"][2], -X) and len(record.calls["other"]) == 1


def test_no_tokens_no_call():
    module, record = _Experts(lambda w, x: F.linear(x, w[1])), _Record()
    with torch.no_grad(), observe_inputs([module.target()], record):
        module(X[:0])
    assert not record.calls


def test_a_batch_differs_per_expert():
    module, record = _Experts(lambda w, x: torch.bmm(x, w.mT)), _Record()
    batch = torch.randn(3, 5, 4)
    with torch.no_grad(), observe_inputs([module.target()], record):
        module(batch)
    assert all(torch.equal(record.calls["w"][e], batch[e]) for e in range(3))


@pytest.mark.parametrize(
    "apply",
    [
        lambda w, x: torch.einsum("mk,enk->emn", x, w),
        lambda w, x: torch.bmm(x.expand(2, 5, 4), w[[0, 1]].mT),  # a copy of two experts
        lambda w, x: F.linear(x, w[1, 4:]),  # never the first rows
    ],
)
def test_products_that_are_not_recognised_are_an_error(apply):
    module = _Experts(apply)
    with (
        pytest.raises(ProxsparseError, match="no product with w"),
        torch.no_grad(),
        observe_inputs([module.target()], _Record()),
    ):
        module(X)


@pytest.mark.parametrize("shape", [(3, 8, 4), (3, 4, 4)])
def test_a_misread_layout_is_an_error(shape):
    """Also where the weight is square and nothing else would notice."""
    module = _Experts(lambda w, x: F.linear(x, w[1]), shape)
    with (
        pytest.raises(ProxsparseError, match="layout was misread"),
        torch.no_grad(),
        observe_inputs([module.target(transposed=True)], _Record()),
    ):
        module(X)
