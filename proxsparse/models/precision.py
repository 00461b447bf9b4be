"""How a model computes while masks are learned, and how it gets back unharmed.

Kept weights must end bitwise as they began. Low-precision parameters may be widened to float32 for
the time of learning, since that is exact and rounding them back returns the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from proxsparse.errors import ProxsparseError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL_MODEL = 2_000_000_000  # parameters: of larger ones float32 copies would fill a GPU's memory


def resolve_dtype(name: str, model: nn.Module, memory: str = "") -> torch.dtype | None:
    """The dtype to compute in; None keeps the parameters as they are.

    Args:
        name: "auto" or a key of `DTYPES`. Auto is float32 on CPU and for models of fewer than 2e9
            parameters (autocast to bfloat16 on a GPU), otherwise the model's own dtype.
        model: the model.
        memory: of a learned method, its mode: fast makes auto float32, balanced and low the model's
            own dtype.

    Raises:
        ProxsparseError: unknown name.
    """
    if name == "auto" and memory:
        return torch.float32 if memory == "fast" else None
    if name == "auto":
        parameters = list(model.parameters())
        small = sum(p.numel() for p in parameters) < SMALL_MODEL
        return torch.float32 if small or parameters[0].device.type == "cpu" else None
    if name not in DTYPES:
        raise ProxsparseError(f"--dtype is {name!r}: choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


@contextlib.contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Hold the model's floating parameters in `dtype`, then give each its own dtype back.

    Raises:
        ProxsparseError: a parameter would lose bits in `dtype`.
    """
    changed = {
        name: p.dtype
        for name, p in model.named_parameters()
        if dtype is not None and p.is_floating_point() and p.dtype != dtype
    }
    for name, original in changed.items():
        if dtype != torch.float32 or original == torch.float64:
            raise ProxsparseError(
                f"--dtype {dtype} would round {name}, which is {original}, and kept weights must "
                f"stay bitwise what they were: choose auto or float32"
            )
    parameters = dict(model.named_parameters())
    for name in changed:
        parameters[name].data = parameters[name].data.to(dtype)
    try:
        yield
    finally:
        for name, original in changed.items():
            parameters[name].grad = None
            parameters[name].data = parameters[name].data.to(original)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside the block; each module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def autocast(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """bfloat16 autocast for a float32 model on a GPU; nothing elsewhere (a CPU gains nothing).

    Without its cache: that would keep a copy of every weight, and a weight made on demand is
    another one when it is made again.
    """
    p = next(model.parameters())
    if p.device.type == "cuda" and p.dtype == torch.float32:
        return torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()
