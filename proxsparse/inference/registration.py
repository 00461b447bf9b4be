"""Makes transformers know packed models once proxsparse is imported, in whichever order.

transformers has no plug-in mechanism for quantisers, only a list one can add to once the module
that holds it is loaded. `import proxsparse` must not load it: that would take seconds, and torch.
So where the list is loaded already, we add to it; where it is not, a finder that knows this single
module waits for its import, adds to the list right after, and is gone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"
_OURS = "proxsparse.inference.quantizer"  # adds to the registry when it is imported


def register() -> None:
    """Register now or as soon as there is something to register with; once is enough."""
    if _REGISTRY in sys.modules:
        importlib.import_module(_OURS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


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
        importlib.import_module(_OURS)
