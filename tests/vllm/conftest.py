"""Small models to serve, and what transformers makes of them."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import proxsparse

DEMO = Path(proxsparse.__file__).parent / "demo_model"
HAS_VLLM = importlib.util.find_spec("vllm") is not None
PROMPTS = [[3 + i * 7 + j * (i + 1) for j in range(5 + i)] for i in range(6)]
NUM_TOKENS = 24
# Projections that the mixed models leave dense: parts of merged layers, and a whole block's.
DENSE = ("k_proj", "up_proj", "re:.*layers.1.mlp.*")

if HAS_VLLM:  # read when vLLM is imported
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def _vllm_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What vLLM compiles is compiled, and stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("vllm")))
        yield


def _config(kind: str) -> Any:
    import transformers

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,  # so that the next token is not the same for every text
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return {
        "llama": lambda: transformers.LlamaConfig(**sizes),
        "qwen2": lambda: transformers.Qwen2Config(**sizes),
        "phi3": lambda: transformers.Phi3Config(**sizes),
        "mixtral": lambda: transformers.MixtralConfig(**sizes, **experts),
    }[kind]()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a model's directory: `model(kind, form, seed)`, each once.

    The forms are "dense", "pruned" and "packed", and with some projections left dense "part" and
    "mixed", which is "part" packed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from proxsparse.jobs.pack import pack

    root = tmp_path_factory.mktemp("models")

    def make(kind: str, form: str, seed: int = 0) -> Path:
        path: Path = root / f"{kind}-{form}-{seed}"
        if path.exists():
            return path
        if form == "dense":
            torch.manual_seed(seed)
            made = AutoModelForCausalLM.from_config(_config(kind))
            for name, parameter in made.named_parameters():
                if name.endswith("bias"):  # they begin as zeros, which shows nothing
                    torch.nn.init.normal_(parameter, std=0.5)
            made.save_pretrained(path)
            AutoTokenizer.from_pretrained(DEMO).save_pretrained(path)
        elif form in ("pruned", "part"):
            left = (
                DENSE
                if form == "part"
                else ("gate_up_proj", "down_proj")
                if kind == "mixtral"
                else ()
            )
            proxsparse.prune(make(kind, "dense", seed), path, method="magnitude", ignore=left)
        else:
            pack(make(kind, {"packed": "pruned", "mixed": "part"}[form], seed), path)
        return path

    return make


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the plug-in logs meanwhile; vLLM removes handlers when it sets up its own."""
    log = logging.getLogger("vllm.plugins.proxsparse")
    found: list[str] = []

    def show(message: str, *args: Any, **_: Any) -> None:
        found.append(message % args)

    for level in ("info", "warning"):
        monkeypatch.setattr(log, level, show)
    return found


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Token ids of a few short texts."""
    return PROMPTS


@pytest.fixture(scope="session")
def greedy() -> Callable[[Any], list[list[int]]]:
    """What a model of transformers generates for each of the prompts."""

    def generate(reference: Any) -> list[list[int]]:
        tokens = []
        for prompt in PROMPTS:
            whole = reference.generate(
                torch.tensor([prompt]),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            tokens.append(whole[0, len(prompt) :].tolist())
        assert len({token for row in tokens for token in row}) > 25, "a text that shows little"
        return tokens

    return generate


@pytest.fixture(scope="session")
def expected(greedy: Callable[[Any], list[list[int]]]) -> Callable[[Path], list[list[int]]]:
    """What transformers generates for the prompts with the model of a directory, in float32."""
    from transformers import AutoModelForCausalLM

    @functools.cache
    def of(path: Path) -> list[list[int]]:
        return greedy(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))

    return of
