"""Weights, gradients and logits in pieces: the same numbers as whole, on every kind of layer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from proxsparse.config import LearnConfig, TargetConfig
from proxsparse.learning import loop as learning
from proxsparse.learning import loss
from proxsparse.learning.job import Job
from proxsparse.learning.layerwise import collect_input_norms
from proxsparse.learning.loop import learn
from proxsparse.learning.loss import (
    can_chunk,
    chunked_divergence_loss,
    chunked_next_token_loss,
    divergence_loss,
    next_token_loss,
)
from proxsparse.learning.streaming import consuming_gradients, weights_on_demand
from proxsparse.methods.gates import _Gates
from proxsparse.models.targets import find_targets

KINDS = ["llama", "gpt2", "qwen3_moe", "gpt_oss", "mixtral", "gemma2", "opt"]
TOKENS = torch.randint(0, 96, (6, 16), generator=torch.Generator().manual_seed(3))


class Gates(_Gates):
    """The default method with float32 states, whichever way the weights are held."""

    def __init__(self, on_demand: bool, *args: Any) -> None:
        super().__init__(*args)
        self.on_demand = on_demand


def run(model: Any, on_demand: bool, targets: Any) -> tuple[dict[str, Any], list[Any]]:
    config = LearnConfig(steps=5, batch_size=2, lr=0.1, lam=2.0)
    job = Job(model, targets, TOKENS, config, None)
    norms = collect_input_norms(model, targets, TOKENS)
    masks = learn(job, Gates(on_demand, config, norms))
    return {k: v.tolist() for k, v in masks.codes.items()}, [r["loss"] for r in job.history]


@pytest.mark.parametrize("name", KINDS)
def test_on_demand_equals_resident_weights_bitwise(tiny_model: Any, name: str) -> None:
    model = tiny_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pointers = {k: p.data_ptr() for k, p in model.named_parameters()}
    targets = find_targets(model)
    resident, on_demand = run(model, False, targets), run(model, True, targets)
    assert on_demand == resident
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert {k: p.data_ptr() for k, p in model.named_parameters()} == pointers


def test_a_targeted_lm_head_is_made_on_demand_too(tiny_model: Any) -> None:
    model = tiny_model("llama")
    targets = find_targets(model, TargetConfig(targets=("lm_head", "mlp.down_proj")))
    assert run(model, True, targets) == run(model, False, targets)


def test_gradients_are_those_of_the_written_weights_and_one_buffer_serves_all(
    tiny_model: Any,
) -> None:
    model = tiny_model("llama")
    targets = find_targets(model)
    new = {t.name: torch.randn_like(t.weight()) for t in targets.layers}
    addresses, seen = set(), {}

    def write(target: Any, out: Tensor) -> None:
        addresses.add(out.untyped_storage().data_ptr())
        out.copy_(new[target.name])

    def consume(target: Any, grad: Tensor) -> None:
        assert all(p.grad is None or p is target.parameter for p in model.parameters())
        seen[target.name] = grad.clone()

    for p in model.parameters():
        p.requires_grad_(False)
    for t in targets.layers:
        t.parameter.requires_grad_(True)
    with weights_on_demand(targets, write), consuming_gradients(targets.layers, consume):
        next_token_loss(model, TOKENS).backward()
    assert len(addresses) == 1
    for t in targets.layers:
        t.set_weight_(new[t.name])
    next_token_loss(model, TOKENS).backward()
    assert set(seen) == set(new)
    for t in targets.layers:
        assert torch.equal(seen[t.name], t.grad())


def test_an_error_in_a_block_leaves_the_weights(tiny_model: Any) -> None:
    model = tiny_model("llama")
    targets = find_targets(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def fail(*_: Any) -> None:
        raise KeyError

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(KeyError), weights_on_demand(targets, lambda _, out: out.zero_()):
        next_token_loss(model, TOKENS)
    handle.remove()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert "forward" not in model.model.layers[1].__dict__


def dense_as(model: Any, weights: dict[str, Tensor]) -> Any:
    """A context in which the model has these weights."""

    @contextlib.contextmanager
    def dense() -> Iterator[None]:
        own = {k: p.data for k, p in model.named_parameters()}
        for k, p in model.named_parameters():
            p.data = weights[k]
        yield
        for k, p in model.named_parameters():
            p.data = own[k]

    return dense


@pytest.mark.parametrize("kind", ["next token", "divergence"])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "phi", "qwen2"])
def test_chunked_loss_equals_the_whole_one(
    tiny_model: Any, name: str, kind: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 96 * 7)  # pieces of 7 tokens, and a rest
    model = tiny_model(name).double()
    assert can_chunk(model, TOKENS)
    weights = {k: p.detach() + 0.05 * torch.randn_like(p) for k, p in model.named_parameters()}
    dense = dense_as(model, weights)
    if kind == "next token":
        losses = [next_token_loss, chunked_next_token_loss]
    else:
        losses = [
            functools.partial(divergence_loss, dense=dense),
            functools.partial(chunked_divergence_loss, dense=dense, dense_head=dense),
        ]
    largest: list[int] = []
    head = model.get_output_embeddings()
    results = []
    for compute in losses:
        model.zero_grad()
        largest.clear()
        with head.register_forward_hook(lambda _, __, out: note(largest, out)):
            value = compute(model, TOKENS)
            (2 * value).backward()
        results.append((value.detach(), *(p.grad for p in model.parameters())))
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-12)
    assert max(largest) == 7


def note(largest: list[int], out: Tensor) -> None:
    """Remember how many rows of logits there were; hidden states that pass through are none."""
    if out.shape[-1] == 96:
        largest.append(out.shape[:-1].numel())


def test_divergence_is_that_of_the_definition_and_none_from_itself(tiny_model: Any) -> None:
    model = tiny_model("llama").double()
    same = contextlib.nullcontext
    assert divergence_loss(model, TOKENS, same).item() == pytest.approx(0, abs=1e-12)
    weights = {k: p.detach() + 0.05 * torch.randn_like(p) for k, p in model.named_parameters()}
    dense = dense_as(model, weights)
    log_p = model(input_ids=TOKENS).logits.log_softmax(-1)
    with dense():
        log_q = model(input_ids=TOKENS).logits.log_softmax(-1)
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    torch.testing.assert_close(divergence_loss(model, TOKENS, dense), expected)


@pytest.mark.parametrize("name", ["gemma2", "clipped"])
def test_logits_that_change_after_the_head_are_not_chunked(tiny_model: Any, name: str) -> None:
    model = tiny_model("gemma2" if name == "gemma2" else "llama")
    if name != "gemma2":
        forward = model.forward

        def changed(**kwargs: Any) -> Any:
            out = forward(**kwargs)
            out.logits = out.logits.clamp(-0.1, 0.1)
            return out

        model.forward = changed
    assert not can_chunk(model, TOKENS)


def test_a_model_without_a_head_of_its_own_is_not_chunked(tiny_model: Any) -> None:
    model = tiny_model("llama")
    model.get_output_embeddings = lambda: None
    assert not can_chunk(model, TOKENS)


def test_lean_modes_use_pieces_and_agree_with_fast(tiny_model: Any) -> None:
    """On a tiny model few of the weights are decided otherwise by low-precision states."""
    kept: dict[str, Tensor] = {}
    for memory in ("fast", "balanced", "low"):
        model = tiny_model("llama")
        targets = find_targets(model)
        config = LearnConfig(steps=20, batch_size=2, lam=2.0, memory=memory)  # type: ignore[arg-type]
        norms = collect_input_norms(model, targets, TOKENS)
        job = Job(model, targets, TOKENS, config, None)
        masks = learn(job, _Gates(config, norms))
        kept[memory] = torch.cat([m.flatten() for m in masks.values()])
        dtypes = {x.dtype for x in _Gates(config, norms).start(*_layer(targets)).values()}
        assert (
            dtypes
            == {
                "fast": {torch.float32},
                "balanced": {torch.float32, torch.bfloat16},
                "low": {torch.float32, torch.uint8, torch.int8, torch.int64},
            }[memory]
        )
    for memory in ("balanced", "low"):
        assert (kept[memory] == kept["fast"]).float().mean() > 0.8


def _layer(targets: Any) -> tuple[Any, Tensor]:
    return targets.layers[0], targets.layers[0].weight()


def test_bits_of_masks() -> None:
    mask = torch.rand(3, 12) > 0.5
    bits = learning._unpack_bits(learning._pack_bits(mask))
    assert torch.equal(bits.flatten()[:36].bool(), mask.flatten())
