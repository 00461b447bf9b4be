"""Modules whose tensors accelerate keeps elsewhere: on disk, or on the CPU beside a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Bring back the tensors of a module that accelerate has offloaded, inside the block."""
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield
