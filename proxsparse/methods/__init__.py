"""The methods, by name. To add one, see "Add a method" in CONTRIBUTING.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from proxsparse.config import METHOD_OPTIONS
from proxsparse.errors import ProxsparseError
from proxsparse.learning.job import Job
from proxsparse.methods.gates import MEMORY as gates_memory
from proxsparse.methods.gates import gates
from proxsparse.methods.magnitude import magnitude
from proxsparse.methods.proxsparse import MEMORY as proxsparse_memory
from proxsparse.methods.proxsparse import proxsparse
from proxsparse.methods.sparsegpt import sparsegpt
from proxsparse.methods.wanda import wanda
from proxsparse.models.masks import Masks


@dataclass(frozen=True)
class Method:
    """A way to choose masks.

    Attributes:
        name: what users call it.
        summary: one line for --help.
        run: from a `Job` to `Masks`. The kept weights are the originals when it returns, except for
            methods that say otherwise in `updates_weights`.
        learned: whether it runs the optimiser loop (and takes `LearnConfig`).
        needs_data: whether it looks at calibration text (and takes `CalibrationConfig`).
        memory: of a learned method, the values of --memory it knows, the fastest first, and the
            bytes it keeps in each per pruned weight beside the parameter.
    """

    name: str
    summary: str
    run: Callable[[Job], Masks]
    learned: bool = False
    needs_data: bool = True
    memory: Mapping[str, float] = field(default_factory=dict)

    @property
    def config(self) -> type[Any]:
        """The dataclass of its own options."""
        return METHOD_OPTIONS[self.name]

    def updates_weights(self, options: Any) -> bool:
        """Whether the kept weights change under these options."""
        return not getattr(options, "mask_only", True)


METHODS = {
    method.name: method
    for method in (
        Method(
            "gates",
            "gates on frozen weights; no setting (default)",
            gates,
            learned=True,
            memory=gates_memory,
        ),
        Method(
            "proxsparse",
            "the paper: AdamW and the prox on weights",
            proxsparse,
            learned=True,
            memory=proxsparse_memory,
        ),
        Method("sparsegpt", "layer by layer, updates the kept weights", sparsegpt),
        Method("wanda", "layer by layer, |weight| x activation norm", wanda),
        Method("magnitude", "largest weights; needs no data", magnitude, needs_data=False),
    )
}


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        ProxsparseError: there is none.
    """
    if name not in METHODS:
        raise ProxsparseError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]
