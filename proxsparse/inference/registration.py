"""Makes transformers and peft know packed models once torch or proxsparse is imported.

In whichever order they are imported.

transformers has no plug-in mechanism for quantisers, only two tables one can add to once the module
that holds them is loaded. torch has one: the entry-point group `torch.backends`, which it calls at
the end of its own import, so that a program that never imports proxsparse reads packed models too.

Neither import may load transformers: that would take seconds. So where the tables are there
already, we add to them; where they are not, a finder waits for them, adds to them, and is gone.
What is added are stand-ins that import ours on first use. peft is waited for in the same way: its
LoRA asks us about each config before it looks for layers, see `adapters.prepare`. Nothing of ours
is imported while the module of the tables is, so no two threads can wait for each other's imports.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_METHOD = "proxsparse"
_OURS = "proxsparse.inference.quantizer"
_ADAPTERS = "proxsparse.inference.adapters"
_TABLES = {
    "AUTO_QUANTIZER_MAPPING": "PackedQuantizer",
    "AUTO_QUANTIZATION_CONFIG_MAPPING": "PackedConfig",
}


def register() -> None:
    """Register now or as soon as there is something to register with; once is enough."""
    waiting = {finder.registry for finder in sys.meta_path if isinstance(finder, _Finder)}
    for registry in _ADD:
        if not _add(registry) and registry not in waiting:
            sys.meta_path.insert(0, _Finder(registry))


def autoload() -> None:
    """What torch calls through the entry-point group `torch.backends`; it never raises."""
    try:
        register()
    except Exception:  # torch would refuse to be imported at all
        logging.getLogger(__name__).warning("packed models stay unknown", exc_info=True)


def _add(registry: str) -> bool:
    """Add to a module's tables; False where they are not there yet."""
    module = sys.modules.get(registry)
    return module is not None and _ADD[registry](module)


def _add_quantizer(module: ModuleType) -> bool:
    if not all(hasattr(module, table) for table in _TABLES):
        return False  # half way through its import
    for table, name in _TABLES.items():
        getattr(module, table).setdefault(_METHOD, _StandIn(name))
    return True


def _add_adapter(module: ModuleType) -> bool:
    owner: Any = getattr(module, "LoraModel", None)
    if owner is None:
        return False
    original = owner._prepare_model  # which peft has for changes before adapters are put in
    if not hasattr(original, "by_proxsparse"):

        @functools.wraps(original)
        def prepare(self: Any, peft_config: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            if "proxsparse.inference.sparse_linear" in sys.modules:  # else nothing is packed
                importlib.import_module(_ADAPTERS).prepare(peft_config, model)
            return original(self, peft_config, model, *args, **kwargs)

        prepare.by_proxsparse = True  # type: ignore[attr-defined]
        owner._prepare_model = prepare
    return True


_ADD: dict[str, Callable[[ModuleType], bool]] = {
    "transformers.quantizers.auto": _add_quantizer,
    "peft.tuners.lora.model": _add_adapter,
}


class _StandIn:
    """A class of ours that is imported when it is called or looked into."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _load(self) -> Any:
        return getattr(importlib.import_module(_OURS), self._name)

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self._load()(*args, **settings)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._load(), attribute)


class _Finder(MetaPathFinder):
    """Finds a registry as every other finder would, and has us run after its loader.

    If the registry is being imported already, the next import of anything else finds it complete.
    """

    def __init__(self, registry: str) -> None:
        self.registry = registry

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.registry:
            if _add(self.registry):
                self._leave()
            return None
        self._leave()
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.registry)
        return spec

    def _leave(self) -> None:
        with contextlib.suppress(ValueError):  # another thread was first
            sys.meta_path.remove(self)


class _Loader(Loader):
    """Runs a module by its own loader, which it keeps, and then registers."""

    def __init__(self, loader: Loader, registry: str) -> None:
        self.loader, self.registry = loader, registry

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _add(self.registry)
