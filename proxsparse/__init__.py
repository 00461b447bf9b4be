"""proxsparse: learned 2:4 sparsity for Hugging Face causal language models.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    import proxsparse

    masks = proxsparse.learn_masks(model, "my_text.txt", tokenizer)
    proxsparse.apply_masks_(model, masks)

Names are looked up on first use, so that `import proxsparse` loads neither torch nor a model
library.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from proxsparse.inference.registration import register

if TYPE_CHECKING:
    from proxsparse.config import (
        CalibrationConfig,
        EvalConfig,
        GatesConfig,
        LearnConfig,
        MagnitudeConfig,
        MaskLLMConfig,
        ProxSparseConfig,
        RunConfig,
        SparseGPTConfig,
        TargetConfig,
        WandaConfig,
    )
    from proxsparse.errors import Interrupted, ProxsparseError
    from proxsparse.inference.adapters import merge_and_pack
    from proxsparse.inference.sparse_linear import SparseLinear
    from proxsparse.inference.sparsify import densify_, sparsify_
    from proxsparse.jobs.advise import advise
    from proxsparse.jobs.compare import evaluate_models
    from proxsparse.jobs.evaluate import evaluate_perplexity
    from proxsparse.jobs.generate import generate
    from proxsparse.jobs.inspect import inspect_model
    from proxsparse.jobs.pack import pack, unpack
    from proxsparse.jobs.prune import PruneResult, learn_masks, prune
    from proxsparse.jobs.recover import recover
    from proxsparse.models.masks import Masks, apply_masks_, masks_of
    from proxsparse.models.training import check_masks, keep_masks_, mask_callback

try:
    __version__ = version("proxsparse")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

_HOME = {
    "CalibrationConfig": "config",
    "EvalConfig": "config",
    "GatesConfig": "config",
    "Interrupted": "errors",
    "LearnConfig": "config",
    "MagnitudeConfig": "config",
    "MaskLLMConfig": "config",
    "Masks": "models.masks",
    "ProxSparseConfig": "config",
    "ProxsparseError": "errors",
    "PruneResult": "jobs.prune",
    "RunConfig": "config",
    "SparseGPTConfig": "config",
    "SparseLinear": "inference.sparse_linear",
    "TargetConfig": "config",
    "WandaConfig": "config",
    "advise": "jobs.advise",
    "apply_masks_": "models.masks",
    "check_masks": "models.training",
    "densify_": "inference.sparsify",
    "evaluate_models": "jobs.compare",
    "evaluate_perplexity": "jobs.evaluate",
    "generate": "jobs.generate",
    "inspect_model": "jobs.inspect",
    "keep_masks_": "models.training",
    "learn_masks": "jobs.prune",
    "mask_callback": "models.training",
    "masks_of": "models.masks",
    "merge_and_pack": "inference.adapters",
    "pack": "jobs.pack",
    "prune": "jobs.prune",
    "recover": "jobs.recover",
    "sparsify_": "inference.sparsify",
    "unpack": "jobs.pack",
}

__all__ = [
    "CalibrationConfig",
    "EvalConfig",
    "GatesConfig",
    "Interrupted",
    "LearnConfig",
    "MagnitudeConfig",
    "MaskLLMConfig",
    "Masks",
    "ProxSparseConfig",
    "ProxsparseError",
    "PruneResult",
    "RunConfig",
    "SparseGPTConfig",
    "SparseLinear",
    "TargetConfig",
    "WandaConfig",
    "advise",
    "apply_masks_",
    "check_masks",
    "densify_",
    "evaluate_models",
    "evaluate_perplexity",
    "generate",
    "inspect_model",
    "keep_masks_",
    "learn_masks",
    "mask_callback",
    "masks_of",
    "merge_and_pack",
    "pack",
    "prune",
    "recover",
    "sparsify_",
    "unpack",
]


register()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'proxsparse' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"proxsparse.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
