"""The plug-in's edges, with vLLM and without an engine."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from proxsparse import ProxsparseError, ops

pytest.importorskip("vllm", reason="vLLM is not installed here: see `make test-vllm`")


def test_vllm_finds_it_and_registering_again_changes_nothing() -> None:
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        get_quantization_config,
    )

    (entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "proxsparse"]
    for _ in range(2):
        entry.load()()
    assert get_quantization_config("proxsparse").__name__ == "SparseConfig"
    assert QUANTIZATION_METHODS.count("proxsparse") == 1


def test_registering_is_light() -> None:
    """vLLM calls it in each process, also where it serves a model that is none of ours."""
    code = (
        "import sys, vllm.model_executor.layers.quantization\n"
        "before = set(sys.modules)\n"
        "from proxsparse.vllm import register\n"
        "register()\n"
        "print(*sorted(name for name in set(sys.modules) - before if 'proxsparse' in name))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    loaded = done.stdout.splitlines()[-1].split()
    light = {"", ".errors", ".inference", ".inference.registration"}
    light |= {".vllm", ".vllm.config", ".vllm.names"}
    assert {name.removeprefix("proxsparse") for name in loaded} <= light


def test_registering_never_raises(monkeypatch: pytest.MonkeyPatch, messages: list[str]) -> None:
    from vllm.model_executor.layers import quantization

    from proxsparse.vllm import register

    def fail(_: str) -> Any:
        raise RuntimeError("another vLLM")

    monkeypatch.setattr(quantization, "get_quantization_config", fail)
    register()
    (message,) = messages
    assert "cannot be served by this vLLM" in message


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ({"quant_method": "fp8"}, "stored as fp8:"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}},
            "stored as compressed-tensors:",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            r"compressed-tensors \(sparse-24-bitmask\)",
        ),
    ],
)
def test_checkpoints_that_are_not_stored_dense_are_refused(
    entry: dict[str, Any], what: str
) -> None:
    from proxsparse.vllm.config import SparseConfig

    assert SparseConfig.override_quantization_method(entry, None) is None
    with pytest.raises(ProxsparseError, match=what):
        SparseConfig.override_quantization_method(entry, "proxsparse", hf_config=None)
    with pytest.raises(ProxsparseError, match=what):
        SparseConfig.from_config(entry)


def test_a_dense_entry_of_compressed_tensors_is_ours_when_asked_for() -> None:
    from proxsparse.vllm.config import SparseConfig

    entry = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}
    assert SparseConfig.override_quantization_method(entry, "proxsparse") == "proxsparse"
    assert SparseConfig.override_quantization_method(entry, None) is None
    assert SparseConfig.from_config(entry).names is None


def test_a_damaged_entry_is_refused() -> None:
    from proxsparse.vllm.config import SparseConfig

    with pytest.raises(ProxsparseError, match="layers"):
        SparseConfig.from_config({"quant_method": "proxsparse", "layers": "all"})


def platform(**answers: Any) -> Any:
    """A platform of vLLM that answers so."""
    defaults = {"is_cpu": False, "is_cuda": True, "has_device_capability": True}
    defaults |= {"get_device_capability": "7.5"}
    defaults |= answers
    return SimpleNamespace(
        device_name="tpu", **{k: (lambda *_, v=v: v) for k, v in defaults.items()}
    )


@pytest.mark.parametrize(
    ("answers", "dtype", "message"),
    [
        ({"is_cuda": False}, torch.bfloat16, "not on tpu.*proxsparse unpack"),
        ({"has_device_capability": False}, torch.bfloat16, "8.0 or later.*has 7.5.*unpack"),
        ({}, torch.float32, "float32: start it with --dtype bfloat16"),
        ({}, torch.float16, r"cannot be used here \(not built\).*proxsparse env"),
    ],
)
def test_devices_and_dtypes_that_cannot_run_are_refused(
    answers: dict[str, Any], dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.platforms

    from proxsparse.vllm.config import _check_platform

    monkeypatch.setattr(vllm.platforms, "_current_platform", platform(**answers))
    monkeypatch.setattr(ops, "implementation", lambda *_: "not built")
    with pytest.raises(ProxsparseError, match=message):
        _check_platform(dtype)


def test_another_version_of_vllm_warns(
    monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    import vllm

    from proxsparse.vllm import config

    for version, warns in (("0.26.0", 0), ("0.32.1+cpu", 0), ("0.33.0", 1), ("dev", 0)):
        messages.clear()
        config._warn_of_version.cache_clear()
        monkeypatch.setattr(vllm, "__version__", version)
        config._warn_of_version()
        assert len(messages) == warns, version
