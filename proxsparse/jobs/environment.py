"""What this machine can do: versions, devices, and every op with the backend that would run it."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from proxsparse.jobs.output import versions
from proxsparse.ops import dispatch, schemas

_OPTIONAL = ("triton", "datasets", "accelerate", "matplotlib", "lm_eval", "compressed_tensors")


def describe_environment() -> dict[str, Any]:
    """Versions, devices, the CUDA extension, and each op's backends: there, or why not."""
    return {
        "versions": {**versions(), **{name: _version(name) for name in _OPTIONAL}},
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "cuda": _describe_cuda(),
        "ops": {
            op: {backend: _availability(op, backend) for backend in dispatch.BACKENDS}
            for op in schemas.OPS
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


def _describe_cuda() -> dict[str, str]:
    """The CUDA extension, its kernels, cuSPARSELt and the tuning table: there, or why not."""
    try:
        from proxsparse.backends import cusparselt
        from proxsparse.backends.build_notes import why_left_out
        from proxsparse.backends.table import table_for
    except ImportError as error:
        return {"extension": f"no: {error}"}
    reason = why_left_out("cuda_kernels") or "not compiled"
    description = {
        "extension": "yes",
        "kernels": "yes" if cusparselt.extension.has_kernels else f"no: {reason}",
    }
    found = cusparselt.find_library()
    if isinstance(found, str):
        return {**description, "cusparselt": f"no: {found}"}
    description["cusparselt"] = f"{found.version_text} from {found.path}"
    if not torch.cuda.is_available():
        return {**description, "tuning table": "no: there is no CUDA device"}
    warning = cusparselt.version_warning(found.version, torch.cuda.get_device_capability())
    if warning:
        description["cusparselt"] += f" ({warning})"
    table = table_for(torch.cuda.current_device())
    description["tuning table"] = f"{table.path}, {len(table)} entries"
    return description


def _availability(op: str, backend: str) -> str:
    """Whether it is there: "yes", or the reason why not."""
    found = dispatch.implementation(op, backend)
    if isinstance(found, str):
        return f"no: {found}"
    if backend in ("cuda", "triton") and not torch.cuda.is_available():
        return "no: there is no CUDA device"
    return "yes"
