"""Which backend runs an op on a tensor, or the reason in words why one cannot.

Automatic choice takes the first fast backend of the tensor's device that has the op, and logs once
why when there is none; a backend asked for by name, with `use_backend`, runs or raises.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from proxsparse.errors import ProxsparseError
from proxsparse.ops import reference

_log = logging.getLogger(__name__)

BACKENDS = ("reference", "cpu", "cuda", "triton")
# Device type -> its fast backends, best first.
_FAST = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.bool)
_EIGHT_BIT = {"triton": (torch.uint8,)}  # backend -> further dtypes of its first operand
forced_backend: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend.

    Args:
        name: one of `BACKENDS`.

    Raises:
        ProxsparseError: at once for an unknown name; at the op's call when that backend cannot run
            it.
    """
    if name not in BACKENDS:
        raise ProxsparseError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    token = forced_backend.set(name)
    try:
        yield
    finally:
        forced_backend.reset(token)


@functools.cache
def implementation(op: str, backend: str) -> Callable[..., Any] | str:
    """The function that runs `op` on `backend`, or the reason in words why there is none."""
    if backend == "reference":
        defined: Callable[..., Any] | str = getattr(reference, op, f"reference has no {op}")
        return defined
    stem = op.rstrip("_")
    module = (
        f"proxsparse.kernels.{stem}" if backend == "triton" else f"proxsparse.backends.{backend}"
    )
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), f"{stem}_{backend}")
    except ModuleNotFoundError as error:
        if error.name == module:
            return f"{backend} has no {op}"
        return str(error)
    except ImportError as error:
        return str(error)
    except AttributeError:
        return f"{backend} has no {op}"
    return function


def choose(op: str, first: Tensor) -> Callable[..., Any]:
    """The implementation for a call whose main operand is `first`."""
    forced = forced_backend.get()
    here = _FAST.get(first.device.type, ())
    wanted = (forced,) if forced else here
    reasons = []
    for backend in wanted:
        if backend == "reference":
            break
        if backend not in here:
            found: Callable[..., Any] | str = f"its tensors are on {first.device.type}"
        elif first.dtype not in (*_FAST_DTYPES, *_EIGHT_BIT.get(backend, ())):
            found = f"its dtype is {first.dtype}"
        else:
            found = implementation(op, backend)
        if not isinstance(found, str):
            return found
        reasons.append(found)
    if forced and reasons:
        raise ProxsparseError(
            f"backend {forced!r} was asked for, but cannot run {op}: {reasons[0]}"
        )
    defined = implementation(op, "reference")
    if isinstance(defined, str):
        raise ProxsparseError(
            f"{op} cannot run on {first.device.type}: {'; '.join([*reasons, defined])}"
        )
    if reasons:
        _log_once(f"{op} runs on the reference backend: {'; '.join(dict.fromkeys(reasons))}")
    return defined


@functools.cache
def _log_once(message: str) -> None:
    _log.info(message)
