"""Mask files, and masks on real modules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from proxsparse.errors import ProxsparseError
from proxsparse.models.masks import FORMAT, Masks, apply_masks_, layer_report, model_fingerprint
from proxsparse.models.targets import find_targets
from proxsparse.ops import mask_2to4
from proxsparse.ops.reference import mask_to_codes

SHAPES = {"one": (1, 4), "odd": (3, 20), "large": (64, 132), "experts": (3, 5, 12)}
METADATA = {"base_model": "some/model", "method": "gates", "settings": '{"lr": 0.1}'}
SIX_CODES = (4, 8, 9, 12, 13, 14)  # i | j << 2 with i < j


def make_masks(shapes: Mapping[str, tuple[int, ...]], **metadata: str) -> Masks:
    codes = {
        name: mask_to_codes(mask_2to4(torch.randn(shape)).reshape(-1))
        for name, shape in shapes.items()
    }
    return Masks(codes, dict(shapes), metadata)


def random_masks(model: Any) -> Masks:
    """A mask that magnitude would not choose, for every target of the model."""
    masks = Masks()
    for target in find_targets(model).layers:
        masks.add(target, mask_2to4(torch.randn(target.shape)))
    return masks


def test_round_trip(tmp_path: Path) -> None:
    masks = make_masks(SHAPES, **METADATA)
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert set(loaded) == set(masks) == set(SHAPES) and len(loaded) == len(SHAPES)
    assert loaded.metadata == METADATA
    for name, shape in SHAPES.items():
        assert loaded[name].dtype == torch.bool and loaded[name].shape == shape
        assert torch.equal(loaded[name], masks[name])
        assert (loaded[name].reshape(-1, 4).sum(-1) == 2).all()


def test_one_bit_per_weight_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    shapes = {name: (64, 132) for name in "abc"}
    make_masks(shapes, **METADATA).save(path)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    num_weights = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert 8 * (path.stat().st_size - header) <= num_weights


def write(path: Path, codes: Tensor, shape: list[int] | None, **changes: str) -> None:
    shapes = {} if shape is None else {"layer": shape}
    metadata = {"format": FORMAT, "shapes": json.dumps(shapes)} | changes
    save_file({"layer": codes}, str(path), metadata=metadata)


@pytest.mark.parametrize("code", [code for code in range(16) if code not in SIX_CODES])
@pytest.mark.parametrize("group", [0, 3])
def test_an_invalid_code_is_named_with_its_group(tmp_path: Path, code: int, group: int) -> None:
    nibbles = [4] * 4
    nibbles[group] = code
    low_high = torch.tensor(nibbles).reshape(2, 2)
    codes = (low_high[:, 0] | low_high[:, 1] << 4).to(torch.uint8)
    write(tmp_path / "m.safetensors", codes, [2, 8])
    message = f"m.safetensors: layer is not 2:4: group {group} has code {code}, which does not"
    with pytest.raises(ProxsparseError, match=message):
        Masks.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("code", SIX_CODES)
def test_the_six_valid_codes(tmp_path: Path, code: int) -> None:
    write(tmp_path / "m.safetensors", torch.tensor([code], dtype=torch.uint8), [1, 4])
    mask = Masks.load(tmp_path / "m.safetensors")["layer"]
    assert mask.nonzero()[:, 1].tolist() == [code & 3, code >> 2]


@pytest.mark.parametrize(
    ("codes", "shape"),
    [
        (torch.full((4,), 0x44, dtype=torch.uint8), [2, 8]),
        (torch.full((1,), 0x44, dtype=torch.uint8), [2, 8]),
        (torch.full((1, 2), 0x44, dtype=torch.uint8), [2, 8]),
        (torch.full((2,), 0x44, dtype=torch.int32), [2, 8]),
        (torch.full((2,), 0x44, dtype=torch.uint8), None),
    ],
    ids=["too_long", "too_short", "two_d", "int32", "no_shape"],
)
def test_codes_that_do_not_fit_the_shape(
    tmp_path: Path, codes: Tensor, shape: list[int] | None
) -> None:
    write(tmp_path / "m.safetensors", codes, shape)
    with pytest.raises(
        ProxsparseError, match=r"layer has .* bytes of codes, which is not its shape"
    ):
        Masks.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file(tmp_path: Path, share: float) -> None:
    path = tmp_path / "m.safetensors"
    make_masks(SHAPES).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ProxsparseError, match=r"m.safetensors cannot be read .*truncated"):
        Masks.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "proxsparse-masks-0"}])
def test_a_safetensors_file_of_something_else(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(4)}, str(path), metadata=metadata)
    with pytest.raises(ProxsparseError, match="holds no proxsparse masks"):
        Masks.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ProxsparseError, match=r"there is no mask file .*nowhere"):
        Masks.load(tmp_path / "nowhere")


# gpt2: Conv1D, stored [K, N]; qwen3_moe: experts [E, N, K]; gpt_oss: experts [E, K, N].
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gpt_oss"])
def test_apply_keeps_bitwise_and_prunes_to_plus_zero(tiny_model: Any, name: str) -> None:
    model = tiny_model(name)
    masks = random_masks(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    apply_masks_(model, masks)
    transposed = {t.parameter_name: t.transposed for t in find_targets(model).layers}
    for key, w in model.state_dict().items():
        old = before[key]
        if key in masks:
            mask = masks[key].mT if transposed[key] else masks[key]
            zero = torch.zeros((), dtype=w.dtype)
            assert torch.equal(w.view(torch.int32), torch.where(mask, old, zero).view(torch.int32))
            # Groups run along the input dimension, wherever it is stored.
            along_inputs = w.mT if transposed[key] else w
            nonzeros = along_inputs.reshape(-1, 4).ne(0).sum(-1)
            assert (nonzeros == 2).all()
        else:
            assert torch.equal(w, old), key
    assert any(len(masks[key].shape) == 3 for key in masks) == (name in ("qwen3_moe", "gpt_oss"))


def test_conv1d_masks_are_in_the_orientation_of_the_layer(tiny_model: Any) -> None:
    model = tiny_model("gpt2")
    name = "transformer.h.0.mlp.c_fc.weight"
    stored = model.get_parameter(name)
    masks = random_masks(model)
    assert masks[name].shape == (48, 32) and stored.shape == (32, 48)  # [N, K], [K, N]


def test_masks_survive_the_disk_bit_for_bit(tiny_model: Any, tmp_path: Path) -> None:
    model, again = tiny_model("gpt2"), tiny_model("gpt2")
    masks = random_masks(model)
    masks.save(tmp_path / "m.safetensors")
    apply_masks_(model, masks)
    apply_masks_(again, Masks.load(tmp_path / "m.safetensors"))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_masks_of_some_layers_leave_the_others_alone(tiny_model: Any) -> None:
    model = tiny_model("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    untouched = {k: v.clone() for k, v in model.state_dict().items() if k != name}
    apply_masks_(model, make_masks({name: (48, 32)}))
    assert (model.get_parameter(name).reshape(-1, 4) != 0).sum(-1).eq(2).all()
    for key, value in untouched.items():
        assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"model.layers.7.mlp.up_proj.weight": (48, 32)}, "made for another model.*layers.7"),
        ({"model.layers.0.mlp.up_proj.weight": (32, 48)}, r"has shape \[32, 48\], .* \[48, 32\]"),
    ],
    ids=["missing_layer", "wrong_shape"],
)
def test_masks_of_another_model_change_nothing(
    tiny_model: Any, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    model = tiny_model("llama")
    before = [p.clone() for p in model.parameters()]
    good = {"model.layers.0.mlp.gate_proj.weight": (48, 32)}
    with pytest.raises(ProxsparseError, match=message):
        apply_masks_(model, make_masks(good | shapes))
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe"])
def test_fingerprint_is_of_the_target_weights(tiny_model: Any, name: str) -> None:
    model = tiny_model(name)
    targets = find_targets(model)
    fingerprint = model_fingerprint(targets)
    assert model_fingerprint(find_targets(tiny_model(name))) == fingerprint

    model.register_buffer("unrelated", torch.ones(3))
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1
    assert model_fingerprint(find_targets(model)) == fingerprint

    for target in (targets.layers[0], targets.layers[-1]):
        parameter = target.parameter
        with torch.no_grad():
            old = parameter.view(-1)[-1].item()
            parameter.view(-1)[-1] = old * (1 + 2**-20) + 1e-6
            assert model_fingerprint(targets) != fingerprint
            parameter.view(-1)[-1] = old
    assert model_fingerprint(targets) == fingerprint
    assert model_fingerprint(find_targets(model.bfloat16())) != fingerprint


def test_layer_report_counts_the_overlap_with_magnitude(tiny_model: Any) -> None:
    model = tiny_model("llama")
    targets = find_targets(model)
    masks = Masks()
    for target in targets.layers:
        by_magnitude = mask_2to4(target.weight())
        # All the same, or, for the first layer, exactly the other two.
        masks.add(target, ~by_magnitude if target is targets.layers[0] else by_magnitude)
    report = layer_report(targets, masks)
    assert [row["name"] for row in report] == [t.name for t in targets.layers]
    assert [row["shape"] for row in report] == [list(t.shape) for t in targets.layers]
    assert [row["overlap_with_magnitude"] for row in report] == [0.0] + [1.0] * (len(report) - 1)
