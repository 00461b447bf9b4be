"""vLLM on a GPU, with CUDA graphs and torch.compile: packed models are as likely as dense ones."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: see `make test-vllm`")
pytestmark = pytest.mark.gpu

CLOSE = 0.15  # of log-probabilities; rounding in bfloat16 moves them by some hundredths


def generated(path: Path, prompts: list[list[int]], **settings: Any) -> list[list[Any]]:
    """For each prompt (token, log-probability) of its own tokens, and of 24 generated greedily."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(path),
        dtype="bfloat16",
        max_model_len=128,
        max_num_seqs=64,
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.3,
        **settings,
    )
    how = SamplingParams(
        temperature=0,
        max_tokens=24,
        ignore_eos=True,
        detokenize=False,
        logprobs=1,
        prompt_logprobs=1,
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    rows = []
    for prompt, result in zip(prompts, llm.generate(inputs, how, use_tqdm=False), strict=True):
        read = zip(prompt[1:], result.prompt_logprobs[1:], strict=True)
        output = result.outputs[0]
        written = zip(output.token_ids, output.logprobs, strict=True)
        rows.append([(token, found[token].logprob) for token, found in (*read, *written)])
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return rows


@pytest.mark.parametrize(
    ("kind", "form", "dense", "settings"),
    [
        ("llama", "packed", "pruned", {}),
        ("qwen2", "mixed", "part", {}),
        ("qwen2", "part", "part", {"quantization": "proxsparse"}),
        ("phi3", "packed", "pruned", {"cpu_offload_gb": 0.001}),
    ],
)
def test_what_is_generated_is_as_likely_as_with_dense_weights(
    kind: str,
    form: str,
    dense: str,
    settings: dict[str, Any],
    model: Callable[..., Path],
    prompts: list[list[int]],
) -> None:
    many = [prompt for prompt in prompts for _ in range(6)]  # more tokens than a decode kernel's
    sparse = generated(model(kind, form), many, **settings)
    for ours, theirs in zip(sparse, generated(model(kind, dense), many), strict=True):
        for (token, ours_at), (other, theirs_at) in zip(ours, theirs, strict=True):
            assert abs(ours_at - theirs_at) < CLOSE
            if token != other:  # as likely as each other; what follows differs
                break
