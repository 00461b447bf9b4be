"""Greedy decoding gives what transformers gives, token for token, and says how it decoded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from proxsparse import ProxsparseError, ops, sparsify_
from proxsparse.inference.attention import (
    _STEP_ATTENTION,
    _grouped_attention,
    configs_to_regroup,
    regrouped,
)
from proxsparse.inference.decoding import Decoder, NoStaticCache, _argmax, decode_greedily
from proxsparse.jobs.generate import generate
from proxsparse.models.targets import find_targets

TinyModel = Callable[[str], Any]
WITHOUT_STATIC_CACHE = ("dbrx", "jetmoe")
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4", *WITHOUT_STATIC_CACHE)


@pytest.fixture
def lively(tiny_model: TinyModel) -> TinyModel:
    """As `tiny_model`, with larger weights, so that tokens differ; no token is an end."""

    def make(name: str) -> Any:
        return enliven_(tiny_model(name))

    return make


def enliven_(model: Any) -> Any:
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(2 if id(parameter) in looked_up else 15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def with_kv_heads(model: Any, num: int) -> Any:
    """Another model of its kind, lively too, whose 4 query heads share so many of keys."""
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = num
    return enliven_(type(model)(config).eval())


def prune_(model: Any) -> Any:
    for target in find_targets(model).layers:
        target.set_weight_(ops.project_2to4(target.weight()))
    return model


def prompts(model: Any, batch_size: int = 3, length: int = 11) -> Tensor:
    return torch.randint(3, model.config.vocab_size, (batch_size, length), device=model.device)


def expected(model: Any, x: Tensor, max_new_tokens: int) -> list[list[int]]:
    """What transformers decodes."""
    mask = torch.ones_like(x)
    output = model.generate(x, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
    return output[:, x.shape[1] :].tolist()


def test_equals_transformers(lively: TinyModel, tiny_model_name: str) -> None:
    model = prune_(lively(tiny_model_name))
    x = prompts(model)
    dense = expected(model, x, 20)
    assert len({token for row in dense for token in row}) > 4
    decoded = decode_greedily(model, x, 20)
    assert decoded.tokens == dense
    assert decoded.num_steps == 19
    assert decoded.prefill_seconds > 0 and decoded.decode_seconds > 0
    if tiny_model_name not in MIXTURES:  # of which transformers 4 takes none, and 5 most
        assert decoded.decoding == "static cache"
    if tiny_model_name in WITHOUT_STATIC_CACHE:
        assert decoded.decoding.startswith("transformers: ")
        assert "does not support a static cache" in decoded.decoding
    sparsify_(model)
    decoded = decode_greedily(model, x, 20)
    assert decoded.tokens == expected(model, x, 20)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_sliding_windows(lively: TinyModel, name: str) -> None:
    model = lively(name)
    model.config.sliding_window = 5
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = 5
    x = prompts(model)
    decoded = decode_greedily(model, x, 12)
    assert decoded.tokens == expected(model, x, 12) and decoded.decoding == "static cache"


def test_one_new_token(lively: TinyModel) -> None:
    model = lively("llama")
    for length in (1, 11):
        x = prompts(model, length=length)
        decoded = decode_greedily(model, x, 1)
        assert decoded.tokens == expected(model, x, 1) and decoded.num_steps == 0


@pytest.mark.parametrize("name", ["llama", "dbrx"])
def test_stops_at_the_end_token(lively: TinyModel, name: str) -> None:
    model = lively(name)
    x = prompts(model, batch_size=2)
    free = expected(model, x, 20)
    ends = [row[4] for row in free]
    model.generation_config.eos_token_id = ends
    decoded = decode_greedily(model, x, 20)
    stops = [min(row.index(end) for end in ends if end in row) for row in free]
    assert decoded.tokens == [row[: stop + 1] for row, stop in zip(free, stops, strict=True)]
    assert decoded.num_steps == max(stops)
    model.generation_config.eos_token_id = free[0][0]
    decoded = decode_greedily(model, x[:1], 20)
    assert decoded.tokens == [free[0][:1]] and decoded.num_steps == 0


def test_decoder_starts_anew_at_each_prefill(lively: TinyModel) -> None:
    model = lively("qwen2")
    decoder = Decoder(model, 3, 16)
    for length in (11, 5):
        x = prompts(model, length=length)
        decoder.prefill(x)
        while decoder.length < 16:
            decoder.step()
        assert decoder.tokens[:, :length].equal(x)
        assert decoder.tokens[:, length:].tolist() == expected(model, x, 16 - length)
    with pytest.raises(ProxsparseError, match="room in max_tokens, 16"):
        decoder.step()


def test_refuses_what_does_not_fit(lively: TinyModel) -> None:
    model = lively("llama")
    decoder = Decoder(model, 3, 16)
    with pytest.raises(ProxsparseError, match="needs a prefill"):
        decoder.step()
    for shape in ((2, 4), (3, 16), (3, 0)):
        with pytest.raises(ProxsparseError, match="3 prompts of 1 to 15 tokens"):
            decoder.prefill(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ProxsparseError, match="--max-new-tokens is 0"):
        generate("model", "text", max_new_tokens=0, device="cpu")


def test_says_why_there_is_no_static_cache(lively: TinyModel, monkeypatch: Any) -> None:
    model = lively("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(NoStaticCache, match="flash_attention_2 attention would read"):
        Decoder(model, 1, 16)
    model.config._attn_implementation = "sdpa"

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(NoStaticCache, match="fails with a static cache: no such thing"):
        Decoder(model, 1, 16)
    monkeypatch.setattr(model, "_is_stateful", True, raising=False)
    with pytest.raises(NoStaticCache, match="LlamaForCausalLM has a recurrent state"):
        Decoder(model, 1, 16)


class NoReadBack(TorchDispatchMode):
    """Raises where a value leaves its tensor, for which a host would wait on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi", "opt", "gpt_neox", "gpt2"]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_step_reads_nothing_back(lively: TinyModel, name: str, attention: str) -> None:
    model = prune_(lively(name))
    model.set_attn_implementation(attention)
    decoder = Decoder(model, 2, 16)
    decoder.prefill(prompts(model, batch_size=2))
    with NoReadBack():
        decoder.step()
    with pytest.raises(AssertionError), NoReadBack():
        decoder.tokens[0, 0].item()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_shared_keys_are_not_repeated(
    lively: TinyModel, kv_heads: int, batch_size: int, monkeypatch: Any
) -> None:
    model = with_kv_heads(lively("llama"), kv_heads)
    x = prompts(model, batch_size)
    decoder = Decoder(model, batch_size, 31)
    decoder.prefill(x)
    plain, seen = torch.nn.functional.scaled_dot_product_attention, []

    def watch(query: Tensor, key: Tensor, *given: Any, **named: Any) -> Tensor:
        seen.append((query.shape, key.shape))
        return plain(query, key, *given, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    decoder.step()
    monkeypatch.undo()
    query, key = (batch_size, kv_heads, 4 // kv_heads, 8), (batch_size, kv_heads, 31, 8)
    assert seen == [(query, key)] * 2
    while decoder.length < 31:
        decoder.step()
    assert decoder.tokens[:, 11:].tolist() == expected(model, x, 20)


def attention_arguments(dtype: torch.dtype, length: int = 1) -> dict[str, Any]:
    mask = torch.rand(3, 1, length, 13) < 0.7
    mask[..., 0] = True
    return {
        "module": nn.Module(),
        "query": torch.randn(3, 8, length, 16).to(dtype),
        "key": torch.randn(3, 2, 13, 16).to(dtype),
        "value": torch.randn(3, 2, 13, 16).to(dtype),
        "attention_mask": mask,
        "scaling": 0.3,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bool", "of one sequence", "added", "none"])
def test_grouped_attention_is_the_same(dtype: torch.dtype, kind: str) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    given = attention_arguments(dtype)
    mask = given["attention_mask"]
    added = torch.where(mask, torch.randn(mask.shape), -torch.inf).to(dtype)
    masks = {"bool": mask, "of one sequence": mask[:1], "added": added, "none": None}
    given["attention_mask"] = masks[kind]
    ours, no_weights = _grouped_attention(**given, dropout=0.0, position_ids=mask, use_cache=True)
    given["module"].num_key_value_groups = 4
    theirs, _ = sdpa_attention_forward(**given)
    assert no_weights is None and ours.dtype == dtype and ours.shape == theirs.shape
    assert ours.is_contiguous()
    exact = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }
    truth, _ = sdpa_attention_forward(**exact)
    allowed = 2 * (theirs.double() - truth).abs().max() + 1e-7
    assert (ours.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize(
    "change",
    [
        {"query": torch.zeros(3, 8, 2, 16), "attention_mask": None},
        {"query": torch.zeros(3, 2, 1, 16)},
        {"attention_mask": torch.ones(3, 8, 1, 13, dtype=torch.bool)},
        {"attention_mask": torch.ones(3, 1, 1, 20, dtype=torch.bool)},
        {"dropout": 0.5},
        {"softcap": 30.0},
        {"s_aux": torch.zeros(8)},
        {"is_causal": True},
        {"position_bias": torch.zeros(1, 8, 1, 13)},
    ],
    ids=str,
)
def test_other_attention_is_left_to_transformers(change: dict[str, Any], monkeypatch: Any) -> None:
    from transformers.integrations import sdpa_attention

    def keep(*given: Any, **named: Any) -> Any:
        names = ("module", "query", "key", "value", "attention_mask")
        return dict(zip(names, given, strict=True)) | named

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", keep)
    given: Any = {"dropout": 0.0} | attention_arguments(torch.float32) | change
    passed: Any = _grouped_attention(**given)
    assert passed.keys() == given.keys()
    assert all(passed[name] is x for name, x in given.items())


def test_the_model_keeps_its_attention(lively: TinyModel) -> None:
    model = lively("llama")
    seen, fails = [], []

    def look(*_: Any) -> None:
        seen.append(model.config._attn_implementation)
        if fails:
            raise RuntimeError("no such thing")

    model.model.norm.register_forward_hook(look)
    decoder = Decoder(model, 1, 16)
    decoder.prefill(prompts(model, 1))
    decoder.step()
    assert seen == ["sdpa", _STEP_ATTENTION] * 2
    fails.append(True)
    with pytest.raises(RuntimeError, match="no such thing"):
        decoder.step()
    assert seen.pop() == _STEP_ATTENTION and model.config._attn_implementation == "sdpa"
    fails.clear()
    model.set_attn_implementation("eager")
    decoder.step()
    assert seen.pop() == model.config._attn_implementation == "eager"


def test_each_config_keeps_its_own_attention() -> None:
    from transformers import LlavaConfig

    config = LlavaConfig()
    parts = [config, config.text_config, config.vision_config]
    for part, name in zip(parts, ("sdpa", "sdpa", "eager"), strict=True):
        part._attn_implementation = name
    model = nn.Module()
    model.config, model.part = config, nn.Module()
    model.part.config, model._supports_attention_backend = config.text_config, True
    found = configs_to_regroup(model)
    assert found[0] is config and {id(x) for x in found} == {id(x) for x in parts}
    with pytest.raises(ValueError), regrouped(found):
        names = [part._attn_implementation for part in parts]
        assert names == [_STEP_ATTENTION, _STEP_ATTENTION, "eager"]
        raise ValueError
    assert [part._attn_implementation for part in parts] == ["sdpa", "sdpa", "eager"]


def test_attention_that_is_not_transformers_own_stays(lively: TinyModel, monkeypatch: Any) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    model = lively("llama")
    assert configs_to_regroup(model) == [model.config]
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with monkeypatch.context() as patch:
        patch.setattr(model, "_supports_attention_backend", False, raising=False)
        assert not configs_to_regroup(model)
    try:
        AttentionInterface.register("sdpa", lambda *given, **named: plain(*given, **named))
        assert not configs_to_regroup(model)
    finally:
        AttentionInterface.register("sdpa", plain)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_step_is_traced_once_and_whole(
    lively: TinyModel, is_sparse: bool, monkeypatch: Any
) -> None:
    model = prune_(lively("llama"))
    if is_sparse:
        sparsify_(model)
    x, keys = prompts(model), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target is torch.nn.functional.scaled_dot_product_attention:
                keys.append(node.args[1].meta["example_value"].shape)
        return graph

    # What a backend makes of the graph is not the question here, and takes its time.
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda step, **_: compile(step, backend=backend, fullgraph=True)
    )
    torch._dynamo.reset()
    counters.clear()
    decoder = Decoder(model, 3, 32, compile=True)
    for length in (5, 11):
        decoder.prefill(x[:, :length])
        while decoder.length < 32:
            decoder.step()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert keys == [(3, 2, 32, 8)] * 2
    assert decoder.tokens[:, 11:].tolist() == expected(model, x, 21)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("vocabulary", [1, 96, 97, 1024])
def test_argmax_of_two_stages(vocabulary: int) -> None:
    logits = torch.randint(-20, 3, (5, vocabulary)).to(torch.bfloat16)  # so that many are equal
    first = [row.index(max(row)) for row in logits.tolist()]
    assert _argmax(logits).tolist() == first
    assert _argmax(logits).dtype == torch.long


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_the_graph_gives_what_the_step_gives(
    lively: TinyModel, name: str, is_sparse: bool, monkeypatch: Any
) -> None:
    model = prune_(lively(name)).to("cuda", torch.bfloat16)
    if is_sparse:
        sparsify_(model)
    x = prompts(model)
    replayed = decode_greedily(model, x, 20)
    assert replayed.decoding == "cuda graph"
    monkeypatch.setattr(Decoder, "_capture", lambda *_: None)
    stepped = decode_greedily(model, x, 20)
    assert stepped.decoding == "static cache" and replayed.tokens == stepped.tokens
    ends = model.generation_config.eos_token_id = [row[4] for row in stepped.tokens]
    monkeypatch.undo()
    ended = decode_greedily(model, x, 20)
    for row, full in zip(ended.tokens, stepped.tokens, strict=True):
        assert row == full[: len(row)] and row[-1] in ends and len(row) <= 5


@pytest.mark.gpu
def test_what_reads_back_is_not_captured(lively: TinyModel) -> None:
    model = lively("llama").cuda()
    x = prompts(model)
    tokens = decode_greedily(model, x, 20).tokens

    def read_back(*given: Any) -> None:
        given[-1].sum().item()

    model.model.norm.register_forward_hook(read_back)
    decoded = decode_greedily(model, x, 20)
    assert decoded.decoding.startswith("static cache: ") and decoded.tokens == tokens
    torch.cuda.empty_cache()
    torch.randn(8, device="cuda").sum().item()  # the device is none the worse for it


@pytest.mark.gpu
def test_a_compiled_step_gives_what_the_step_gives(lively: TinyModel) -> None:
    model = prune_(lively("llama")).cuda()
    sparsify_(model)
    x = prompts(model)
    plain, compiled = (decode_greedily(model, x, 12, compile=flag) for flag in (False, True))
    assert compiled.decoding == plain.decoding == "cuda graph"
    assert compiled.tokens == plain.tokens


@pytest.mark.sparse_tc
def test_a_compiled_step_in_16_bits_shares_launches(lively: TinyModel, monkeypatch: Any) -> None:
    backend = pytest.importorskip("proxsparse.backends.cuda")
    config = lively("llama").config
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    model = prune_(LlamaForCausalLM(config).eval()).to("cuda", torch.bfloat16)
    sparsify_(model)
    launches = []
    shared = backend._decode_together

    def record(x: torch.Tensor, weights: Any) -> Any:
        launches.append(len(weights))
        return shared(x, weights)

    monkeypatch.setattr(backend, "_decode_together", record)
    assert decode_greedily(model, prompts(model), 12, compile=True).decoding == "cuda graph"
    assert sorted(set(launches)) == [2, 3]  # gate and up; queries, keys and values
