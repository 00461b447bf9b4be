"""Names and shapes of packed layers, without vLLM."""

from __future__ import annotations

import pytest

from proxsparse import ProxsparseError
from proxsparse.vllm.names import (
    PackedNames,
    Summary,
    check_all_taken,
    check_split,
    packed_sizes,
)

QKV = ["q_proj", "k_proj", "v_proj"]


def test_a_merged_layer_is_looked_up_by_its_parts() -> None:
    names = PackedNames(["m.0.attn.q_proj", "m.0.attn.v_proj", "m.0.attn.o_proj"])
    assert names.packed_parts("m.0.attn.qkv_proj", QKV) == [True, False, True]
    assert names.packed_parts("m.1.attn.qkv_proj", QKV) == [False] * 3
    assert names.packed_parts("m.0.attn.o_proj", ["o_proj"]) == [True]
    assert names.left_over() == []


def test_a_layer_that_is_one_on_disk_is_named_as_a_whole() -> None:
    names = PackedNames(["m.qkv_proj", "top"])
    assert names.packed_parts("m.qkv_proj", ["qkv_proj"]) == [True]
    assert names.packed_parts("m.qkv_proj", QKV) == [True] * 3
    assert names.packed_parts("top", ["top"]) == [True]
    assert names.left_over() == []


def test_names_follow_the_models_own() -> None:
    names = PackedNames(["model.a.q_proj"])
    names.rename(name.replace("model.", "language_model.model.") for name in list(names))
    assert names.packed_parts("language_model.model.a.q_proj", ["q_proj"]) == [True]
    assert not names.left_over()


def test_names_without_a_layer_are_refused() -> None:
    names = PackedNames([f"m.{i}.up" for i in range(9)] + ["m.down"])
    assert not names.is_any_taken
    names.packed_parts("m.down", ["down"])
    assert names.is_any_taken
    with pytest.raises(ProxsparseError, match=r"m\.0\.up.* and 3 more are packed.*unpack"):
        check_all_taken(names)
    names.packed_parts("m.8.up", ["up"])
    check_all_taken(PackedNames([]))


def test_names_inside_a_module() -> None:
    names = PackedNames(["m.experts.0.up", "m.expertsother", "lm_head"])
    assert names.inside("m.experts") == ["m.experts.0.up"]
    assert names.inside("lm_head") == ["lm_head"]
    assert names.inside("lm") == []


def test_ranks_that_would_cut_a_byte_are_refused_with_those_that_work() -> None:
    check_split("m.down", 4864, 4)
    check_split("m.down", 36, 1)  # a last half byte is whole on one rank
    with pytest.raises(ProxsparseError, match="48 input features, which over 4 ranks are 12") as e:
        check_split("m.down", 48, 4)
    assert "--tensor-parallel-size 1 or 2 or 3," in str(e.value)
    with pytest.raises(ProxsparseError, match="--tensor-parallel-size 1,"):
        check_split("m.down", 20, 2)


def test_parts_must_be_kept_apart_to_be_packed_apart() -> None:
    assert packed_sizes("m", [True, True], [8, 8, 8]) == [True] * 3
    assert packed_sizes("m", [True, False], [8, 16]) == [True, False]
    with pytest.raises(ProxsparseError, match=r"merged of 2 projections .* vLLM keeps 4 parts"):
        packed_sizes("m", [True, False], [8, 8, 8, 8])


def test_the_summary_says_what_and_why() -> None:
    summary = Summary()
    summary.add_sparse("a.qkv", 4 * 2**20, 3 * 2**20, "parts not packed")
    summary.add_sparse("a.o", 2**20, 2**19)
    for i in range(8):
        summary.add_dense(f"b.{i}", "not packed")
    text = str(summary)
    assert "2 of 10 linear layers run sparse, in 3.5 MiB instead of 5.0: 1.5 MiB saved" in text
    assert "parts not packed: a.qkv" in text
    assert "not packed: b.0, b.1, b.2, b.3, b.4, b.5 and 2 more" in text
    assert summary.num_sparse == 2 and summary.dense["b.0"] == "not packed"
