"""Which weights are pruned: by structure on many architectures, by pattern, and when refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from torch import nn

from proxsparse.config import TargetConfig
from proxsparse.errors import ProxsparseError
from proxsparse.models.targets import Targets, find_targets

H, I = 32, 48  # noqa: E741 - hidden and intermediate size of the tiny models
EXPERTS_ARE_TENSORS = int(transformers.__version__.split(".")[0]) >= 5

ATTENTION = {
    "self_attn.q_proj": (H, H),
    "self_attn.k_proj": (16, H),
    "self_attn.v_proj": (16, H),
    "self_attn.o_proj": (H, H),
}
GATED = {
    **ATTENTION,
    "mlp.gate_proj": (I, H),
    "mlp.up_proj": (I, H),
    "mlp.down_proj": (H, I),
}
ODD = {**ATTENTION, "mlp.gate_proj": (66, H), "mlp.up_proj": (66, H)}
HEAD = {"model.embed_tokens": "embedding", "lm_head": "lm_head"}
TIED = {"model.embed_tokens": "embedding", "lm_head": "tied to embeddings (model.embed_tokens)"}


def _experts(
    name: str, module: str, first: str, last: str, width: int
) -> dict[str, tuple[int, ...]]:
    """The experts of a block: tensors in transformers 5, three linear layers each before."""
    if EXPERTS_ARE_TENSORS:
        return {
            "mlp.experts.gate_up_proj": (4, 2 * width, H),
            "mlp.experts.down_proj": (4, H, width),
        }
    return {
        f"{module}.experts.{expert}.{part}": (H, width) if part == last else (width, H)
        for expert in range(4)
        for part in (first, name, last)
    }


MIXTRAL = _experts("w3", "block_sparse_moe", "w1", "w2", I)
QWEN3_MOE = _experts("up_proj", "mlp", "gate_proj", "down_proj", 24)
ROUTER = "mlp.gate" if EXPERTS_ARE_TENSORS else "block_sparse_moe.gate"

# prefix of the blocks, targets in each with their shape, left dense elsewhere, left dense in each
Expected = tuple[str, dict[str, tuple[int, ...]], dict[str, str], dict[str, str]]
EXPECTED: dict[str, Expected] = {
    **{name: ("model.layers", GATED, HEAD, {}) for name in ("llama", "mistral", "qwen2", "qwen3")},
    **{
        name: ("model.layers", GATED, TIED, {})
        for name in ("llama_tied", "gemma", "gemma2", "gemma3")
    },
    "llama_odd": (
        "model.layers",
        ODD,
        HEAD,
        {"mlp.down_proj": "in_features 66 is not a multiple of 4"},
    ),
    "phi": (
        "model.layers",
        {
            "self_attn.q_proj": (H, H),
            "self_attn.k_proj": (16, H),
            "self_attn.v_proj": (16, H),
            "self_attn.dense": (H, H),
            "mlp.fc1": (I, H),
            "mlp.fc2": (H, I),
        },
        HEAD,
        {},
    ),
    "opt": (
        "model.decoder.layers",
        {
            **{f"self_attn.{name}_proj": (H, H) for name in ("k", "v", "q", "out")},
            "fc1": (I, H),
            "fc2": (H, I),
        },
        {
            "model.decoder.embed_tokens": "embedding",
            "model.decoder.embed_positions": "embedding",
            "lm_head": "tied to embeddings (model.decoder.embed_tokens)",
        },
        {},
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        {
            "attention.query_key_value": (3 * H, H),
            "attention.dense": (H, H),
            "mlp.dense_h_to_4h": (I, H),
            "mlp.dense_4h_to_h": (H, I),
        },
        {
            "gpt_neox.embed_in": "embedding",
            ("lm_head" if EXPERTS_ARE_TENSORS else "embed_out"): "lm_head",
        },
        {},
    ),
    "gpt2": (
        "transformer.h",
        {
            "attn.c_attn": (3 * H, H),
            "attn.c_proj": (H, H),
            "mlp.c_fc": (I, H),
            "mlp.c_proj": (H, I),
        },
        {
            "transformer.wte": "embedding",
            "transformer.wpe": "embedding",
            "lm_head": "tied to embeddings (transformer.wte)",
        },
        {},
    ),
    "mixtral": ("model.layers", {**ATTENTION, **MIXTRAL}, HEAD, {ROUTER: "router"}),
    "qwen3_moe": ("model.layers", {**ATTENTION, **QWEN3_MOE}, HEAD, {"mlp.gate": "router"}),
    "gpt_oss": (
        "model.layers",
        {**ATTENTION, "mlp.experts.gate_up_proj": (4, 64, H), "mlp.experts.down_proj": (4, H, 32)},
        HEAD,
        {
            "mlp.router": "router",
            "mlp.experts.gate_up_proj_bias": "a bias",
            "mlp.experts.down_proj_bias": "a bias",
        },
    ),
    "llama4": (
        "model.layers",
        {
            **ATTENTION,
            "feed_forward.experts.gate_up_proj": (4, 2 * I, H),
            "feed_forward.experts.down_proj": (4, H, I),
            "feed_forward.shared_expert.gate_proj": (I, H),
            "feed_forward.shared_expert.up_proj": (I, H),
            "feed_forward.shared_expert.down_proj": (H, I),
        },
        HEAD,
        {"feed_forward.router": "router"},
    ),
    "dbrx": (
        "transformer.blocks",
        {"norm_attn_norm.attn.Wqkv": (64, H), "norm_attn_norm.attn.out_proj": (H, H)},
        {"transformer.wte": "embedding", "lm_head": "lm_head"},
        {
            "ffn.router.layer": "router",
            **{
                f"ffn.experts.mlp.{w}": "a parameter of DbrxExpertGLU, which is not a linear layer"
                for w in ("w1", "v1", "w2")
            },
        },
    ),
    "jetmoe": (
        "model.layers",
        {
            "mlp.input_linear": (4, 2 * I, H),
            "mlp.output_linear": (4, H, I),
            "self_attention.experts.input_linear": (4, 16, H),
            "self_attention.experts.output_linear": (4, H, 16),
            "self_attention.kv_proj": (32, H),
        },
        HEAD,
        {"mlp.router.layer": "router", "self_attention.experts.router.layer": "router"},
    ),
}


def _names(targets: Targets) -> set[str]:
    return {target.name for target in targets.layers}


def test_expected_targets(tiny_model, tiny_model_name):
    """Every weight is a target of the right shape and block, or left dense for the right reason."""
    prefix, shapes, elsewhere, inside = EXPECTED[tiny_model_name]
    model = tiny_model(tiny_model_name)
    found = find_targets(model)
    assert {t.name: (t.shape, t.block) for t in found.layers} == {
        f"{prefix}.{block}.{name}": (shape, block)
        for block in range(2)
        for name, shape in shapes.items()
    }
    assert found.left_dense == {
        **elsewhere,
        **{f"{prefix}.{block}.{name}": why for block in range(2) for name, why in inside.items()},
    }
    assert found.block_names == (f"{prefix}.0", f"{prefix}.1")
    assert found.blocks == tuple(model.get_submodule(prefix))
    parameters = dict(model.named_parameters())
    assert all(parameters[t.parameter_name] is t.parameter for t in found.layers)


def test_groups_run_along_the_input(tiny_model, tiny_model_name):
    """A linear layer computes x @ weight().T + bias, however it stores its weight."""
    layers = [t for t in find_targets(tiny_model(tiny_model_name)).layers if len(t.shape) == 2]
    assert layers
    for target in layers:
        x = torch.randn(5, target.shape[-1])
        bias = 0 if target.module.bias is None else target.module.bias
        torch.testing.assert_close(target.module(x), x @ target.weight().T + bias)


def test_meta_device(tiny_model):
    real = find_targets(tiny_model("gpt_oss"))
    meta = find_targets(tiny_model("gpt_oss").to("meta"))
    assert [(t.name, t.shape) for t in meta.layers] == [(t.name, t.shape) for t in real.layers]
    assert meta.left_dense == real.left_dense


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_weight_grad_and_set(tiny_model, name):
    """Views and writes agree with the stored parameter, transposed or not, also after a move."""
    model = tiny_model(name)
    target = next(t for t in find_targets(model).layers if "down" in t.name or "c_fc" in t.name)
    assert target.grad() is None
    model.to(torch.float64)
    assert target.weight().data_ptr() == target.parameter.data_ptr()
    w = torch.randn(target.shape, dtype=torch.float64)
    target.set_weight_(w)
    assert torch.equal(target.parameter.mT if target.transposed else target.parameter, w)
    (target.parameter.pow(2) / 2).sum().backward()
    torch.testing.assert_close(target.grad(), w)


def test_set_weight_refuses_another_shape_or_dtype(tiny_model):
    target = find_targets(tiny_model("gpt2")).layers[0]
    with pytest.raises(ProxsparseError, match=r"c_attn is \[96, 32\].*cannot take.*\[32, 96\]"):
        target.set_weight_(torch.zeros(32, 96))
    with pytest.raises(ProxsparseError, match=r"torch\.float32.*torch\.float64"):
        target.set_weight_(torch.zeros(96, 32, dtype=torch.float64))


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("model.layers.1.mlp.up_proj", 1),
        ("self_attn.q_proj", 2),
        ("up_proj", 2),
        ("Linear", 14),
        ("re:.*\\.mlp\\.", 6),
        ("re:model\\.layers\\.0\\.", 7),
        ("re:.*(q|k)_proj$", 4),
    ],
)
def test_patterns(tiny_model, pattern, count):
    model = tiny_model("llama")
    targeted = find_targets(model, TargetConfig(targets=(pattern,)))
    assert len(targeted.layers) == count
    assert len(targeted.layers) + len(targeted.left_dense) == 16
    everything = _names(find_targets(model))
    if count == len(everything):
        return
    ignored = find_targets(model, TargetConfig(ignore=(pattern,)))
    assert _names(ignored) == everything - _names(targeted)
    for name in _names(targeted):
        assert ignored.left_dense[name] == f"ignored by pattern {pattern!r}"


def test_a_name_matches_whole_parts_only(tiny_model):
    with pytest.raises(ProxsparseError, match="'proj' matches no weight"):
        find_targets(tiny_model("llama"), TargetConfig(targets=("proj",)))


def test_class_names_of_conv1d_and_experts(tiny_model):
    assert len(find_targets(tiny_model("gpt2"), TargetConfig(targets=("Conv1D",))).layers) == 8
    experts = find_targets(tiny_model("gpt_oss"), TargetConfig(targets=("GptOssExperts",)))
    assert {t.name.rpartition(".")[2] for t in experts.layers} == {"gate_up_proj", "down_proj"}


def test_ignore_beats_targets(tiny_model):
    config = TargetConfig(targets=("q_proj", "k_proj"), ignore=("re:model\\.layers\\.0",))
    found = find_targets(tiny_model("llama"), config)
    assert _names(found) == {f"model.layers.1.self_attn.{part}_proj" for part in "qk"}
    assert found.left_dense["model.layers.1.mlp.up_proj"] == "not matched by targets"


def test_lm_head_and_routers_only_by_name(tiny_model):
    model = tiny_model("mixtral")
    assert _names(find_targets(model, TargetConfig(targets=("re:.*",)))) == _names(
        find_targets(model)
    )
    found = find_targets(model, TargetConfig(targets=("lm_head", ROUTER)))
    assert {(t.name, t.shape, t.block) for t in found.layers} == {
        ("lm_head", (96, H), 2),
        (f"model.layers.0.{ROUTER}", (4, H), 0),
        (f"model.layers.1.{ROUTER}", (4, H), 1),
    }
    with pytest.raises(
        ProxsparseError, match=r"matches only weights that are not.*lm_head: lm_head"
    ):
        find_targets(model, TargetConfig(targets=("re:lm_head",)))
    assert "lm_head" in find_targets(model, TargetConfig(ignore=("lm_head",))).left_dense


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TargetConfig(targets=("wq",)), r"targets pattern 'wq' matches no.*q_proj \(2\).*Linear"),
        (TargetConfig(ignore=("lm_haed",)), r"ignore pattern 'lm_haed' matches no.*lm_head"),
        (TargetConfig(targets=("re:(",)), r"'re:\(' is not a valid regular expression"),
        (TargetConfig(ignore=("Linear",)), r"no weight of LlamaForCausalLM is left.*'Linear'"),
        (TargetConfig(targets=("embed_tokens",)), r"only weights.*embed_tokens: embedding"),
        (TargetConfig(targets=("lm_head",)), r"only weights.*tied to embeddings"),
    ],
)
def test_bad_patterns(tiny_model, config, message):
    with pytest.raises(ProxsparseError, match=message):
        find_targets(tiny_model("llama_tied"), config)


def test_refuses_what_is_not_a_causal_lm(tiny_model):
    llama = tiny_model("llama")
    for model in (nn.Linear(4, 4), llama.model):
        with pytest.raises(ProxsparseError, match=r"(Linear|LlamaModel) is not a causal language"):
            find_targets(model)
    llama.config.is_encoder_decoder = True
    with pytest.raises(ProxsparseError, match="encoder-decoder"):
        find_targets(llama)


def test_refuses_a_model_without_blocks(tiny_model):
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(ProxsparseError, match="no decoder blocks"):
        find_targets(model)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_refuses_quantised_weights(tiny_model, dtype):
    model = tiny_model("llama")
    packed = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8).view(dtype), requires_grad=False)
    model.model.layers[1].mlp.up_proj.weight = packed
    with pytest.raises(ProxsparseError, match=r"layers\.1\.mlp\.up_proj is stored as torch\.\w*8"):
        find_targets(model)
    ignored = find_targets(model, TargetConfig(ignore=("up_proj",)))
    assert len(ignored.layers) == 12
    model.quantization_method = "gptq"
    with pytest.raises(ProxsparseError, match=r"is quantised \(gptq\)"):
        find_targets(model)


def test_a_larger_tower_is_not_the_decoder(tiny_model):
    model = tiny_model("llama")
    model.tower = nn.ModuleList([nn.Linear(256, 256) for _ in range(4)])
    model.model.tables = nn.ModuleList([nn.Embedding(4096, H)])
    found = find_targets(model)
    assert found.block_names == ("model.layers.0", "model.layers.1")
    assert found.left_dense["tower.3"] == "outside the decoder blocks"


def test_a_shared_weight_is_pruned_once(tiny_model):
    model = tiny_model("llama")
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    found = find_targets(model)
    target = next(t for t in found.layers if t.name == "model.layers.0.mlp.up_proj")
    assert target.sharers == (second,)
    reason = "shares its weight with model.layers.0.mlp.up_proj"
    assert found.left_dense["model.layers.1.mlp.up_proj"] == reason


def test_blocks_of_different_classes(tiny_model):
    """The list is chosen by the weight in it; its blocks need not be alike."""
    model = tiny_model("qwen3_moe")
    dense = tiny_model("llama").model.layers[0]
    model.model.layers[0].mlp = dense.mlp
    model.model.side = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    found = find_targets(model)
    assert found.block_names == ("model.layers.0", "model.layers.1")
    assert "model.layers.0.mlp.up_proj" in _names(found)
    assert found.left_dense["model.side.2"] == "outside the decoder blocks"


class _Experts(nn.Module):
    """Expert tensors without a word on their layout."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("shapes", "transposed"),
    [
        ({"gate_up_proj": (4, 2 * I, H), "down_proj": (4, H, I)}, False),
        ({"gate_up_proj": (4, H, 2 * I), "down_proj": (4, I, H)}, True),
        ({"gate_up_proj": (4, H, 2 * H), "down_proj": (4, H, H)}, True),  # a square one follows
        ({"gate_up_proj": (4, H, H), "down_proj": (4, 16, H)}, True),
        ({"up_proj": (4, H, H), "down_proj": (4, H, H)}, None),
        ({"up_proj": (4, H, I), "down_proj": (4, H, I)}, None),  # one each way
        ({"w1": (4, H, I)}, None),
        ({"up_proj": (4, 12, 20)}, None),
    ],
)
def test_layout_of_undeclared_experts(tiny_model, shapes, transposed):
    """Told by where the hidden size stands; refused by name where that leaves it open."""
    model = tiny_model("llama")
    model.model.layers[0].mlp.experts = _Experts(**shapes)
    found = find_targets(model)
    for name, shape in shapes.items():
        full_name = f"model.layers.0.mlp.experts.{name}"
        if transposed is None:
            assert "does not tell whether" in found.left_dense[full_name]
        else:
            target = next(t for t in found.layers if t.name == full_name)
            assert target.transposed is transposed
            e, n, k = shape
            assert target.shape == ((e, k, n) if transposed else shape)


@pytest.mark.parametrize("transposed", [True, False])
def test_declared_layout_of_experts(tiny_model, transposed):
    """As transformers 5 does on its experts: no need to guess, even where all is square."""
    model = tiny_model("llama")
    model.model.layers[0].mlp.experts = _Experts(w1=(4, H, H))
    model.model.layers[0].mlp.experts.is_transposed = transposed
    target = next(t for t in find_targets(model).layers if t.name.endswith("experts.w1"))
    assert target.transposed is transposed


def test_a_convolution_is_left_dense(tiny_model):
    model = tiny_model("llama")
    model.model.layers[0].mlp.conv = nn.Conv1d(8, 8, 4)
    reason = find_targets(model).left_dense["model.layers.0.mlp.conv"]
    assert reason == "a parameter of Conv1d, which is not a linear layer"


def test_targets_are_frozen(tiny_model):
    target = find_targets(tiny_model("llama")).layers[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.block = 1
