"""Sparse layers in FP8: what they compute, how they move, and models of them in transformers."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from proxsparse import ProxsparseError, SparseLinear, densify_, ops, sparsify_
from proxsparse.inference.decoding import decode_greedily
from proxsparse.inference.sparse_linear import sparse_layers
from proxsparse.models.targets import find_targets
from proxsparse.ops import FP8, reference

TinyModel = Callable[[str], Any]
SCHEME = "FP8_DYNAMIC"


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def dense_layer(n: int, k: int, bias: bool = True, dtype: Any = torch.bfloat16) -> nn.Linear:
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    linear.weight.data = ops.project_2to4(linear.weight.data)
    return linear


def rounded(w: Tensor) -> Tensor:
    """The weight as FP8 rounds it, in its own dtype."""
    return reference.dequantize_fp8(*ops.quantize_fp8(w), w.dtype)


def prune_(model: Any) -> Any:
    for target in find_targets(model).layers:
        target.set_weight_(ops.project_2to4(target.weight()))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(3, 11)[None], use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep_dense", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_computes_the_op_and_holds_the_rounded_weight(
    dtype: torch.dtype, keep_dense: bool, bias: bool
) -> None:
    linear = dense_layer(6, 16, bias, dtype)
    layer = SparseLinear.from_linear(linear, keep_dense=keep_dense, quantize=SCHEME)
    assert layer.values.dtype == FP8 and layer.scheme == SCHEME and layer.dtype == dtype
    values, scale = ops.quantize_fp8(linear.weight)
    x = torch.randn(2, 3, 16, dtype=dtype)
    expected = ops.sparse_linear_fp8(x, *ops.pack_2to4(values), scale, linear.bias)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.weight, rounded(linear.weight.detach()))
    back = layer.to_linear()
    assert type(back) is nn.Linear and back.weight.dtype == dtype and back.bias is linear.bias
    assert torch.equal(bits(back.weight.detach()), bits(rounded(linear.weight.detach())))
    again = SparseLinear.from_linear(back, quantize=SCHEME)
    assert torch.equal(bits(again.values), bits(layer.values))
    assert torch.equal(again.weight_scale, layer.weight_scale)


def test_bytes() -> None:
    layer = SparseLinear.from_linear(dense_layer(64, 128, False), quantize=SCHEME, keep_dense=True)
    assert layer.memory_bytes() == {
        "packed": 64 * 64 + 64 * 16 + 64 * 4,
        "compressed": 0,
        "dense": 64 * 128,
    }
    assert set(layer.state_dict()) == {"values", "codes", "weight_scale"}
    assert "scheme=FP8_DYNAMIC" in repr(layer)


def test_conv1d_comes_back_as_one() -> None:
    conv = Conv1D(12, 8)
    conv.weight.data = ops.project_2to4(conv.weight.data.T).T.contiguous()
    layer = SparseLinear.from_linear(conv, quantize=SCHEME)
    back = layer.to_linear()
    assert type(back) is Conv1D
    assert torch.equal(back.weight.T, rounded(conv.weight.detach().T))


@pytest.mark.parametrize("keep_dense", [False, True])
def test_another_dtype_is_that_of_the_dense_layer_alone(keep_dense: bool) -> None:
    layer = SparseLinear.from_linear(dense_layer(6, 16), quantize=SCHEME, keep_dense=keep_dense)
    values, scale = layer.values.clone(), layer.weight_scale.clone()
    for move, dtype in (
        (lambda: layer.half(), torch.float16),
        (lambda: layer.to(torch.bfloat16), torch.bfloat16),
        (lambda: layer.float(), torch.float32),
        (lambda: layer.to("cpu"), torch.float32),
    ):
        move()
        assert layer.dtype == layer.bias.dtype == dtype
        assert layer.values.dtype == FP8 and torch.equal(bits(layer.values), bits(values))
        assert torch.equal(layer.weight_scale, scale) and layer.weight.dtype == dtype
        assert layer(torch.randn(2, 16, dtype=dtype)).dtype == dtype
        assert not keep_dense or layer.dense.dtype == FP8
    meta = copy.deepcopy(layer).to("meta")
    assert meta.values.is_meta and meta.values.dtype == FP8 and meta.weight_scale.is_meta


def test_autocast_decides_the_dtype_of_the_result() -> None:
    layer = SparseLinear.from_linear(dense_layer(6, 16, dtype=torch.float32), quantize=SCHEME)
    x = torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)


def test_copies_pickles_and_state_dicts() -> None:
    layer = SparseLinear.from_linear(dense_layer(6, 16), quantize=SCHEME, keep_dense=True)
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    other = SparseLinear.empty_like(dense_layer(6, 16), quantize=SCHEME, keep_dense=True)
    other.load_state_dict(layer.state_dict())
    with torch.device("meta"):
        assigned = SparseLinear.empty_like(dense_layer(6, 16), quantize=SCHEME)
    assigned.load_state_dict(layer.state_dict(), assign=True)
    for same in (copy.deepcopy(layer), torch.load(file, weights_only=False), other, assigned):
        assert torch.equal(same(x), layer(x)) and torch.equal(same.weight, layer.weight)


def test_gradients_reach_the_input_and_the_bias() -> None:
    layer = SparseLinear.from_linear(dense_layer(6, 16, dtype=torch.float32), quantize=SCHEME)
    x = torch.randn(3, 16, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 6) @ layer.weight)
    assert torch.equal(layer.bias.grad, torch.full((6,), 3.0))


def test_refusals() -> None:
    linear = dense_layer(6, 16)
    layer = SparseLinear.from_linear(linear, quantize=SCHEME)
    with pytest.raises(ProxsparseError, match="quantize is 'INT4': choose FP8_DYNAMIC"):
        SparseLinear.from_linear(linear, quantize="INT4")
    with pytest.raises(ProxsparseError, match=r"weight_scale is None: values of torch\.float8"):
        SparseLinear(layer.values, layer.codes)
    with pytest.raises(ProxsparseError, match="weight_scale is given"):
        packed = ops.pack_2to4(linear.weight)
        SparseLinear(*packed, weight_scale=layer.weight_scale)
    with pytest.raises(ProxsparseError, match="the weight has 6 rows"):
        SparseLinear(layer.values, layer.codes, weight_scale=torch.ones(5))
    with pytest.raises(ProxsparseError, match="holds a scale that is zero"):
        SparseLinear(layer.values, layer.codes, weight_scale=torch.zeros(6))
    with pytest.raises(ProxsparseError, match=r"values has 48 values with the code of NaN"):
        nan = torch.full((6, 8), 0xFF, dtype=torch.uint8).view(FP8)
        SparseLinear(nan, layer.codes, weight_scale=layer.weight_scale)
    linear.weight.data[0, 0] = torch.inf
    linear.weight.data[0, 1:4] = 0
    with pytest.raises(ProxsparseError, match=r"^up_proj has 1 entries that are NaN or infinite"):
        SparseLinear.from_linear(linear, quantize=SCHEME, name="up_proj")


def test_state_dicts_that_do_not_fit_change_nothing() -> None:
    layer = SparseLinear.from_linear(dense_layer(6, 16), quantize=SCHEME)
    plain = SparseLinear.from_linear(dense_layer(6, 16))
    before = {name: bits(x).clone() for name, x in layer.state_dict().items()}
    state = layer.state_dict()
    nan = {**state, "values": torch.full((6, 8), 0x7F, dtype=torch.uint8).view(FP8)}
    cases = (
        (layer, plain.state_dict(), "take no weights from each other"),
        (plain, state, "take no weights from each other"),
        (layer, {**state, "weight_scale": -torch.ones(6)}, "zero, negative, NaN or infinite"),
        (layer, nan, "48 values with the code of NaN"),
    )
    for target, wrong, message in cases:
        with pytest.raises(ProxsparseError, match=message):
            target.load_state_dict(wrong, strict=False)
    assert all(torch.equal(bits(x), before[name]) for name, x in layer.state_dict().items())


@pytest.fixture
def packed(tiny_model: TinyModel, tmp_path: Path) -> tuple[Any, Path]:
    model = prune_(tiny_model("llama")).to(torch.bfloat16)
    sparsify_(model, quantize=SCHEME)
    model.save_pretrained(tmp_path / "packed")
    return model, tmp_path / "packed"


def load(directory: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **{"dtype": "auto", **settings})


def test_save_and_load_of_every_architecture(
    tiny_model: TinyModel, tiny_model_name: str, tmp_path: Path
) -> None:
    model = prune_(tiny_model(tiny_model_name))
    expected = {
        t.parameter_name: rounded(t.weight().contiguous()) for t in find_targets(model).layers
    }
    sparsify_(model, quantize=SCHEME)
    names = list(sparse_layers(model))
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert list(sparse_layers(loaded)) == names
    torch.testing.assert_close(logits(loaded), logits(model))
    assert set(densify_(loaded)) == set(names)
    for target in find_targets(loaded).layers:
        if target.name in names:
            assert torch.equal(target.weight(), expected[target.parameter_name]), target.name


def test_config_says_scheme_and_format(packed: Any) -> None:
    model, directory = packed
    entry = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert entry == {
        "quant_method": "proxsparse",
        "format_version": 3,
        "keep_dense": False,
        "layers": list(sparse_layers(model)),
        "scheme": SCHEME,
    }
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert tensors[f"{name}.values"].dtype == FP8 and tensors[f"{name}.codes"].shape == (48, 4)
    assert tensors[f"{name}.weight_scale"].shape == (48,)


def test_saving_again_writes_the_same_bytes(packed: Any, tmp_path: Path) -> None:
    _, directory = packed
    load(directory).save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (directory / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, "auto"])
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_device_maps_and_dtypes(packed: Any, device_map: str | None, dtype: Any) -> None:
    model, directory = packed
    loaded = load(directory, device_map=device_map, dtype=dtype)
    for name, layer in sparse_layers(loaded).items():
        original = model.get_submodule(name)
        assert torch.equal(bits(layer.values), bits(original.values))
        assert torch.equal(layer.weight_scale, original.weight_scale)
        assert layer.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    torch.testing.assert_close(logits(loaded).float(), logits(model).float(), rtol=0.1, atol=0.1)


def test_disk_offload(packed: Any, tmp_path: Path) -> None:
    _, directory = packed
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    settings = {"offload_folder": tmp_path / "offload", "offload_buffers": True}
    loaded = load(directory, device_map=device_map, **settings)
    assert torch.equal(logits(loaded), logits(load(directory)))


def test_torch_compile_traces_one_graph(packed: Any) -> None:
    model, _ = packed
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(logits(compiled), expected)


def test_generates(packed: Any) -> None:
    model, directory = packed
    prompt = torch.arange(3, 11)[None]
    tokens = decode_greedily(load(directory), prompt, 5).tokens[0]
    assert list(tokens) == model.generate(prompt, max_new_tokens=5, do_sample=False)[0, 8:].tolist()


def test_layers_that_are_sparse_already_are_rounded_too(tiny_model: TinyModel) -> None:
    model, whole = (prune_(tiny_model("llama")).to(torch.bfloat16) for _ in range(2))
    sparsify_(model, ignore=("down_proj",))
    sparsify_(whole, quantize=SCHEME)
    report = sparsify_(model, quantize=SCHEME, keep_dense=True)
    assert len(report.sparse) == 14 and report.keep_dense
    for name, layer in sparse_layers(model).items():
        assert layer.keep_dense and layer.dense.dtype == FP8
        assert torch.equal(bits(layer.values), bits(whole.get_submodule(name).values))
    assert len(sparsify_(model).sparse) == 14  # without a scheme they stay as they are
    assert {layer.scheme for layer in sparse_layers(model).values()} == {SCHEME}
    assert report.sparse[0].dense_bytes == 32 * 32 * 2


def test_one_scheme_a_model_and_sound_weights(tiny_model: TinyModel) -> None:
    model = prune_(tiny_model("llama"))
    sparsify_(model, quantize=SCHEME, ignore=("down_proj",))
    with pytest.raises(ProxsparseError, match="give quantize='FP8_DYNAMIC'"):
        sparsify_(model)
    with pytest.raises(ProxsparseError, match="quantize is 'fp8': choose FP8_DYNAMIC"):
        sparsify_(model, quantize="fp8")
    model = prune_(tiny_model("llama"))
    model.model.layers[0].mlp.up_proj.weight.data[0, :4] = torch.tensor([torch.nan, 0, 0, 0])
    with pytest.raises(ProxsparseError, match=r"up_proj cannot be sparse: it is damaged"):
        sparsify_(model, quantize=SCHEME, targets=("up_proj",))
    report = sparsify_(model, quantize=SCHEME)
    assert report.left_dense["model.layers.0.mlp.up_proj"].startswith("damaged")


def test_given_scales_are_kept(tiny_model: TinyModel) -> None:
    model = prune_(tiny_model("llama"))
    name = "model.layers.0.mlp.up_proj"
    scale = model.get_submodule(name).weight.detach().abs().amax(-1) / 300
    sparsify_(model, quantize=SCHEME, scales={name: scale})
    assert torch.equal(model.get_submodule(name).weight_scale, scale)


@pytest.mark.parametrize("form", ["values", "codes", "weight_scale"])
def test_a_checkpoint_without_a_form_is_refused(packed: Any, form: str) -> None:
    _, directory = packed
    file = directory / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.mlp.up_proj.{form}"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ProxsparseError, match=f"lacks model.layers.1.mlp.up_proj.{form} of"):
        load(directory)


def test_damaged_values_and_scales_are_refused(packed: Any) -> None:
    _, directory = packed
    file = directory / "model.safetensors"
    sound, name = load_file(file), "model.layers.1.mlp.up_proj"
    values = sound[f"{name}.values"].view(torch.uint8).clone()
    values[0, 0] = 0x7F
    for change, message in (
        ({f"{name}.values": values.view(FP8)}, "up_proj.values has 1 values with the code of NaN"),
        ({f"{name}.weight_scale": torch.zeros(48)}, "up_proj.weight_scale holds a scale"),
    ):
        save_file({**sound, **change}, file, metadata={"format": "pt"})
        with pytest.raises(ProxsparseError, match=message):
            load(directory)
