"""What this machine can do: versions, devices, and every op with the backend that would run it."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from proxsparse import ops
from proxsparse.pruning import versions

_OPTIONAL = ("triton", "datasets", "accelerate", "matplotlib", "lm_eval")


def describe_environment() -> dict[str, Any]:
    """Versions, devices and, per op and backend, whether it is there or why not."""
    return {
        "versions": {**versions(), **{name: _version(name) for name in _OPTIONAL}},
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "ops": {
            op: {backend: _availability(op, backend) for backend in ops.BACKENDS} for op in ops.OPS
        },
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        memory = p.total_memory / 2**30
        devices.append(f"cuda:{index} {p.name}, sm_{p.major}{p.minor}, {memory:.0f} GiB")
    return devices


def _availability(op: str, backend: str) -> str:
    """Whether it is there: "yes", or the reason why not."""
    found = ops.implementation(op, backend)
    if isinstance(found, str):
        return f"no: {found}"
    if backend in ("cuda", "triton") and not torch.cuda.is_available():
        return "no: there is no CUDA device"
    return "yes"
