"""The methods, by name. To add one, see "Add a method" in CONTRIBUTING.md.

The module of a method is imported when the method runs, so that its settings can be checked before
torch is loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from proxsparse.config import METHOD_OPTIONS, NoOptions
from proxsparse.errors import ProxsparseError

if TYPE_CHECKING:
    from proxsparse.config import LearnConfig
    from proxsparse.learning.job import Job
    from proxsparse.models.masks import Masks


@dataclass(frozen=True)
class Method:
    """A way to choose masks: the function `name` of the module `methods.name`.

    Attributes:
        name: what users type.
        title: what tables call it.
        summary: one line for --help.
        learned: whether it runs the optimiser loop (and takes `LearnConfig`).
        needs_data: whether it looks at calibration text (and takes `CalibrationConfig`).
        changes_weights: whether the kept weights change whatever its options.
        alone: whether it runs in one process only, although it learns.
    """

    name: str
    title: str
    summary: str
    learned: bool = False
    needs_data: bool = True
    changes_weights: bool = False
    alone: bool = False

    def run(self, job: Job) -> Masks:
        """The masks of a job.

        The kept weights are the originals when it returns, except for methods that say otherwise in
        `updates_weights`.
        """
        return cast("Masks", getattr(self._module(), self.name)(job))

    @property
    def can_share(self) -> bool:
        """Whether several processes can work on one model."""
        return self.learned and not self.alone

    @property
    def memory(self) -> Mapping[str, float]:
        """Of a learned method: values of --memory, the fastest first, to bytes per pruned weight.

        The bytes are those that it keeps beside the parameter; the module calls them MEMORY.
        """
        return cast("Mapping[str, float]", getattr(self._module(), "MEMORY", {}))

    def resolve(self, learn: LearnConfig, options: Any) -> tuple[LearnConfig, Any]:
        """The settings with the method's own values in the place of None.

        Resolving twice changes nothing.
        """
        resolve = getattr(self._module(), "resolve", None) if self.learned else None
        return (learn, options) if resolve is None else resolve(learn, options)

    def distils(self, options: Any) -> bool:
        """Whether a learned method's loss is the divergence from the dense model.

        Args:
            options: from `resolve`.
        """
        is_published = getattr(options, "lam_units", "weights") == "absolute"
        return self.learned and getattr(options, "distil", not is_published)

    def _module(self) -> Any:
        return importlib.import_module(f"{__name__}.{self.name}")

    @property
    def config(self) -> type[Any]:
        """The dataclass of its own options."""
        return METHOD_OPTIONS.get(self.name, NoOptions)

    def updates_weights(self, options: Any) -> bool:
        """Whether the kept weights change under these options."""
        return self.changes_weights or not getattr(options, "mask_only", True)


METHODS = {
    method.name: method
    for method in (
        Method("gates", "gates", "gates on frozen weights; no setting (default)", learned=True),
        Method(
            "proxsparse", "ProxSparse", "the paper: AdamW and the prox on weights", learned=True
        ),
        Method(
            "maskllm",
            "MaskLLM",
            "to compare with: Gumbel-softmax over the masks of a group",
            learned=True,
            alone=True,
        ),
        Method("sparsegpt", "SparseGPT", "layer by layer, updates the kept weights"),
        Method("wanda", "Wanda", "layer by layer, |weight| x activation norm"),
        Method("magnitude", "magnitude", "largest weights; needs no data", needs_data=False),
    )
}

# What the command recover runs: it takes masks and makes none, so it is no choice of --method.
RECOVERY = Method(
    "recover",
    "recovery",
    "the kept weights learn on, towards the dense model",
    learned=True,
    changes_weights=True,
)


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        ProxsparseError: there is none.
    """
    if name not in METHODS:
        raise ProxsparseError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]
