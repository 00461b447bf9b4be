"""Fixtures and hardware rules of the test suite."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from proxsparse.ops import OPS
from proxsparse.ops.dispatch import implementation, use_backend

# On tensors this small a second thread only waits, for a second a call when cores are shared.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests tune stays out of the user's table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROXSPARSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _places(dtypes: Sequence[torch.dtype]) -> list[Any]:
    return [
        ("reference", torch.float64),
        *(("reference", dtype) for dtype in dtypes),
        *(("cpu", dtype) for dtype in dtypes),
        *(pytest.param(("triton", dtype), marks=pytest.mark.gpu) for dtype in dtypes),
    ]


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Runs a test of the op that its file is named after on one backend.

    Yields:
        The device and dtype that its tensors must have there.
    """
    backend, dtype = request.param
    stem = request.path.stem.removeprefix("test_")
    op = stem if stem in OPS else f"{stem}_"
    if isinstance(found := implementation(op, backend), str):
        pytest.skip(found)
    with use_backend(backend):
        yield {"device": "cuda" if backend == "triton" else "cpu", "dtype": dtype}


@pytest.fixture(scope="session")
def build_emulator(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    """A function that compiles tests/emulator/<name>.cpp with sources in csrc/cuda for the CPU."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    root = Path(__file__).resolve().parents[1]

    def build(name: str, *sources: str) -> ctypes.CDLL:
        if compiler is None:
            pytest.skip("no C++ compiler to build the emulator with")
        folder = tmp_path_factory.mktemp("emulator")
        cuda = root / "csrc" / "cuda"
        for path in (*cuda.glob("*.h"), *(cuda / source for source in sources)):
            shutil.copy(path, folder)
        for path in (root / "tests" / "emulator").iterdir():  # its ptx.h and hopper.h replace those
            shutil.copy(path, folder)
        library = folder / f"{name}.so"
        # Hidden, or else libraries in one process would share the state of what is inline.
        command = [compiler, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fvisibility=hidden"]
        command += ["-x", "c++"]
        command += [f"-I{folder}", f"{name}.cpp", *sources, "-o", str(library)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return ctypes.CDLL(str(library))

    return build


_BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_odd": ("LlamaConfig", {"intermediate_size": 66}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma": ("GemmaConfig", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {"tie_word_embeddings": True}),
    "phi": ("PhiConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32, "tie_word_embeddings": True}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", {"n_inner": 48, "tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", _EXPERTS),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 24},
    ),
    "gpt_oss": ("GptOssConfig", {**_EXPERTS, "intermediate_size": 32}),
    "llama4": ("Llama4TextConfig", {**_EXPERTS, "intermediate_size_mlp": 48}),
    "dbrx": (
        "DbrxConfig",
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "d_model": 32,
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "jetmoe": ("JetMoeConfig", {**_EXPERTS, "kv_channels": 8}),
}
TINY_MODELS = tuple(_CONFIGS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test once for each of TINY_MODELS, or on every backend, if it asks for one."""
    if "place" in metafunc.fixturenames and hasattr(metafunc.module, "DTYPES"):
        metafunc.parametrize("place", _places(metafunc.module.DTYPES), indirect=True, ids=str)
    if "tiny_model_name" in metafunc.fixturenames:
        metafunc.parametrize("tiny_model_name", TINY_MODELS)


@pytest.fixture
def tiny_model() -> Callable[[str], Any]:
    """A factory: `tiny_model("llama")` is a new random causal LM of two blocks, in eval mode."""

    def make(name: str) -> Any:
        import transformers

        config_class, changes = _CONFIGS[name]
        config = getattr(transformers, config_class)(**{**_BASE, **changes})
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _missing_hardware(item: pytest.Item) -> str:
    """What a test's markers ask for and this machine lacks; empty when it can run."""
    needs_sparse = item.get_closest_marker("sparse_tc") is not None
    if not needs_sparse and item.get_closest_marker("gpu") is None:
        return ""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    capability = torch.cuda.get_device_capability()
    if needs_sparse and capability < (8, 0):
        return f"needs compute capability 8.0 for sparse tensor cores, this GPU has {capability}"
    if item.get_closest_marker("two_gpus") is not None and torch.cuda.device_count() < 2:
        return "needs two GPUs"
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what the hardware cannot run."""
    reason = _missing_hardware(item)
    if reason:
        pytest.skip(reason)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """With PROXSPARSE_REQUIRE_GPU=1 a skipped GPU test fails: none is left out by accident.

    It asks for a GPU, not for two.
    """
    outcome = yield
    report = outcome.get_result()
    is_gpu_test = any(item.get_closest_marker(name) for name in ("gpu", "sparse_tc"))
    required = os.environ.get("PROXSPARSE_REQUIRE_GPU") == "1"
    if item.get_closest_marker("two_gpus") is not None and torch.cuda.device_count() < 2:
        required = False
    if required and is_gpu_test and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"PROXSPARSE_REQUIRE_GPU=1, but the test was skipped: {report.longrepr}"
