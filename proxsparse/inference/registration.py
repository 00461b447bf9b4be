"""Makes transformers know packed models once proxsparse is imported, in whichever order.

transformers has no plug-in mechanism for quantisers, only lists one can add to once the module
that holds them is loaded. `import proxsparse` must not load it: that would take seconds, and torch.
So where the lists are loaded already, we add to them; where they are not, a finder that knows this
single module waits for its import, adds to the lists right after, and is gone.

What is added are stand-ins that import our classes when a packed model is met. To import them at
once would be to wait for one module while holding the import lock of another, and a second thread
that imports the two the other way round would wait for ever.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "proxsparse"
_REGISTRY = "transformers.quantizers.auto"
_OURS = "proxsparse.inference.quantizer"


def register() -> None:
    """Register now or as soon as there is something to register with; once is enough."""
    if _REGISTRY in sys.modules:
        _add_to(importlib.import_module(_REGISTRY))  # waits where another thread is loading it
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _add_to(registry: Any) -> None:
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, _Config)
    registry.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, _quantizer)


class _Config:
    """Stands for `PackedConfig`."""

    @staticmethod
    def from_dict(*args: Any, **kwargs: Any) -> Any:
        return importlib.import_module(_OURS).PackedConfig.from_dict(*args, **kwargs)


def _quantizer(*args: Any, **kwargs: Any) -> Any:
    """Stands for `PackedQuantizer`."""
    return importlib.import_module(_OURS).PackedQuantizer(*args, **kwargs)


class _Finder(MetaPathFinder):
    """Finds the registry as every other finder would, and has us run after its loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Runs a module by its own loader, which it keeps, and then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _add_to(module)
