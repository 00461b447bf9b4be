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

from proxsparse.registration import register

if TYPE_CHECKING:
    from proxsparse.config import CalibrationConfig, LearnConfig, RunConfig, TargetConfig
    from proxsparse.errors import Interrupted, ProxsparseError
    from proxsparse.evaluate import evaluate_perplexity
    from proxsparse.masks import Masks, apply_masks_, keep_masks_, masks_of
    from proxsparse.patch import densify_, sparsify_
    from proxsparse.pruning import PruneResult, learn_masks, prune
    from proxsparse.sparse_linear import SparseLinear

try:
    __version__ = version("proxsparse")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

_HOME = {
    "CalibrationConfig": "config",
    "Interrupted": "errors",
    "LearnConfig": "config",
    "Masks": "masks",
    "ProxsparseError": "errors",
    "PruneResult": "pruning",
    "RunConfig": "config",
    "SparseLinear": "sparse_linear",
    "TargetConfig": "config",
    "apply_masks_": "masks",
    "densify_": "patch",
    "evaluate_perplexity": "evaluate",
    "keep_masks_": "masks",
    "learn_masks": "pruning",
    "masks_of": "masks",
    "prune": "pruning",
    "sparsify_": "patch",
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
