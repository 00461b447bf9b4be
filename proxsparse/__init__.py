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
    from proxsparse.config import CalibrationConfig, LearnConfig, RunConfig, TargetConfig
    from proxsparse.errors import Interrupted, ProxsparseError
    from proxsparse.inference.sparse_linear import SparseLinear
    from proxsparse.inference.sparsify import densify_, sparsify_
    from proxsparse.jobs.evaluate import evaluate_perplexity
    from proxsparse.jobs.prune import PruneResult, learn_masks, prune
    from proxsparse.jobs.recover import recover
    from proxsparse.models.masks import Masks, apply_masks_, keep_masks_, masks_of

try:
    __version__ = version("proxsparse")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

_HOME = {
    "CalibrationConfig": "config",
    "Interrupted": "errors",
    "LearnConfig": "config",
    "Masks": "models.masks",
    "ProxsparseError": "errors",
    "PruneResult": "jobs.prune",
    "RunConfig": "config",
    "SparseLinear": "inference.sparse_linear",
    "TargetConfig": "config",
    "apply_masks_": "models.masks",
    "densify_": "inference.sparsify",
    "evaluate_perplexity": "jobs.evaluate",
    "keep_masks_": "models.masks",
    "learn_masks": "jobs.prune",
    "masks_of": "models.masks",
    "prune": "jobs.prune",
    "recover": "jobs.recover",
    "sparsify_": "inference.sparsify",
}

__all__ = [
    "CalibrationConfig",
    "Interrupted",
    "LearnConfig",
    "Masks",
    "ProxsparseError",
    "PruneResult",
    "RunConfig",
    "SparseLinear",
    "TargetConfig",
    "apply_masks_",
    "densify_",
    "evaluate_perplexity",
    "keep_masks_",
    "learn_masks",
    "masks_of",
    "prune",
    "recover",
    "sparsify_",
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
