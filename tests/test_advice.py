"""What a model could gain: limits from its config, and the figures behind them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import proxsparse
from proxsparse import ProxsparseError
from proxsparse.jobs import advise as advice
from proxsparse.jobs.advise import advise, measure
from proxsparse.tuning.tune import Report

DEMO = Path(proxsparse.__file__).parent / "demo_model"


def save_config(tiny_model: Any, name: str, directory: Path) -> Path:
    config = tiny_model(name).config
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    return directory


def test_limits_come_from_bytes_and_operations(tiny_model: Any, tmp_path: Path) -> None:
    result = advise(save_config(tiny_model, "llama", tmp_path), tokens=(1, 64), device="cpu")
    assert not result["measured"] and result["device"] == "cpu" and result["dtype"] == "bfloat16"
    rows = {tuple(row["shape"]): row for row in result["shapes"]}
    assert {shape: row["layers"] for shape, row in rows.items()} == {
        (32, 32): 4,  # q and o
        (16, 32): 4,  # k and v
        (48, 32): 4,  # gate and up
        (32, 48): 2,
    }
    row = rows[48, 32]
    assert row["dense_bytes"] == 48 * 32 * 2 and row["packed_bytes"] == 48 * 32 * 1.125
    assert row["byte_limit"][64] == pytest.approx((3072 + 64 * 160) / (1728 + 64 * 160))
    assert 1 < row["byte_limit"][64] < row["byte_limit"][1] < 2 / 1.125
    assert row["operation_limit"] == 2 and row["speedup"] is None
    layers = sum(row["dense_bytes"] * row["layers"] for row in result["shapes"])
    rest = 2 * (96 * 32 + 5 * 32)  # lm_head and norms; the embedding is only looked up
    model = result["model"]
    assert model["dense_bytes"] == layers + rest
    assert model["packed_bytes"] == layers * 0.5625 + rest
    assert model["operation_limit"] == pytest.approx((layers + rest) / (layers / 2 + rest))
    assert result["left_dense"]["lm_head"] == "lm_head"
    forms = result["alternatives"]
    weights = layers // 2
    assert forms["2:4 in 16 bits"]["bytes"] == model["packed_bytes"]
    assert forms["FP8 and 2:4"]["bytes"] == rest + weights * 0.625
    assert forms["FP8, dense"]["bytes"] == rest + weights
    assert forms["INT4, dense"]["byte_limit"] > forms["FP8 and 2:4"]["byte_limit"]
    assert forms["FP8 and 2:4"]["operation_limit"] == pytest.approx(
        (layers + rest) / (layers / 4 + rest)
    )
    assert forms["INT4, dense"]["operation_limit"] == 1


def test_no_weight_is_read(tiny_model: Any, tiny_model_name: str, tmp_path: Path) -> None:
    """A directory with nothing but a config will do."""
    directory = save_config(tiny_model, tiny_model_name, tmp_path)
    assert [path.name for path in directory.iterdir()] == ["config.json"]
    result = advise(directory, device="cpu")
    assert result["shapes"] and result["model"]["byte_limit"] > 1
    if tiny_model_name == "gpt_oss":
        assert "experts" in result["left_dense"]["model.layers.0.mlp.experts.gate_up_proj"]


def test_patterns_and_packed_directories(tmp_path: Path) -> None:
    result = advise(DEMO, targets=("down_proj",), device="cpu")
    assert [row["shape"] for row in result["shapes"]] == [[192, 512]]
    proxsparse.prune(DEMO, tmp_path / "pruned", method="magnitude")
    from proxsparse.jobs.pack import pack

    pack(tmp_path / "pruned", tmp_path / "packed")
    assert advise(tmp_path / "packed", device="cpu") == advise(DEMO, device="cpu")


def test_refusals(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(ProxsparseError, match=r"--tokens is .*at least 1"):
        advise(DEMO, tokens=(0,))
    with pytest.raises(ProxsparseError, match="is not a directory"):
        advise(tmp_path / "nowhere")
    moe = save_config(tiny_model, "gpt_oss", tmp_path / "moe")
    with pytest.raises(ProxsparseError, match=r"can be sparse: .*experts"):
        advise(moe, targets=("re:.*experts.*",), device="cpu")


def test_a_measurement_times_both_layers() -> None:
    times = measure(16, 32, (1, 3), torch.float32, torch.device("cpu"))
    assert set(times) == {1, 3} and all(a > 0 and b > 0 for a, b in times.values())


def test_the_estimate_weighs_layers_by_their_number() -> None:
    times: Any = {(8, 8): {1: (2.0, 1.0)}, (4, 8): {1: (4.0, 4.0)}, None: {1: (6.0, 1.0)}}
    counts = {(8, 8): 3, (4, 8): 1}
    assert advice._speedup_of_all(counts, times, 1) == (6 + 4 + 6) / (3 + 4 + 6)
    del times[None]
    assert advice._speedup_of_all(counts, times, 1) == (6 + 4) / (3 + 4)


@pytest.mark.gpu
def test_a_gpu_is_measured(tiny_model: Any, tmp_path: Path) -> None:
    result = advise(save_config(tiny_model, "llama", tmp_path), tokens=(1, 64))
    assert result["measured"] and set(result["model"]["speedup"]) == {1, 64}
    assert all(set(row["speedup"]) == {1, 64} for row in result["shapes"])
    assert all(row["predicted"] is not None for row in result["shapes"])


def test_what_the_tuner_did_is_shown() -> None:
    from proxsparse.cli import _tuning_lines

    assert not list(_tuning_lines(None))
    problems, banned = {"64x64 m8": "out of memory"}, {"bfloat16 decode 3": "crashed"}
    report = Report(3, 2, 1, problems, banned, ["64x64 m16"], 12.3)
    lines = list(_tuning_lines(dataclasses.asdict(report)))
    assert lines == [
        "tuning: 3 cells measured, 2 known before, 1 left to predictions when the time was up, "
        "12 s",
        "late: 64x64 m16",
        "not measured: 64x64 m8 (out of memory)",
        "not used: bfloat16 decode 3 (crashed)",
    ]
