"""Several processes on one model: PyTorch's FSDP2 shards it, this file says how.

Every process runs the same program, started by torchrun or accelerate launch. The parameters, and
with them the states of a method, are split by rows (experts by expert), so a group of four is never
divided; `Target` shows each process its own rows, and a rule works on them as on any weight. Each
step's batch is the one of a single process, shared out among the processes, and FSDP averages the
gradients: the run computes what one process would, up to the order of sums.

In a single process every function here is the identity.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from proxsparse.errors import ProcessLost, ProxsparseError
from proxsparse.models.targets import Targets


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes a launcher has started for this job; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process reports and writes files."""
    return rank() == 0


def own_device(device: torch.device) -> torch.device:
    """`device`, or this process's own GPU where it means no GPU in particular."""
    if device.type == "cuda" and device.index is None and world_size() > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within the context the processes of the job can talk.

    Raises:
        ProcessLost: another process ended, so the job cannot go on.
    """
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(x in str(error) for x in ("gloo", "NCCL")):
            raise ProcessLost(
                f"another process of this job ended, so process {rank()} cannot go on "
                f"({str(error).splitlines()[0]}): start the job again with --resume to continue "
                "from its last checkpoint"
            ) from error
        raise
    dist.destroy_process_group()


def shard_(model: nn.Module, targets: Targets, device: torch.device) -> None:
    """Split every parameter of `model` over the processes; each block is gathered when it runs.

    Args:
        model: the whole model, on the CPU or on this process's device, the same in every process.
        targets: what is pruned, and the only parameters that will have gradients.
        device: where this process computes.

    Raises:
        ProxsparseError: a weight stored [K, N], whose rows are columns, does not divide evenly.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    model.requires_grad_(False)
    transposed = set()
    for target in targets.layers:
        target.parameter.requires_grad_(True)
        if target.transposed and target.parameter.dim() == 2:
            transposed.add(target.parameter)
    for p in transposed:
        if p.shape[1] % world_size():
            raise ProxsparseError(
                f"a transposed weight {list(p.shape)} cannot be split over {world_size()} "
                "processes: use a number that divides its columns"
            )

    def placement(p: nn.Parameter) -> Shard | None:
        return Shard(1) if p in transposed else None

    # Gradients are summed in float32 whatever their own dtype.
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world_size(),)),
        "shard_placement_fn": placement,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    for block in targets.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)


def reshard(model: nn.Module) -> None:
    """Let go of gathered parameters, so that `model.parameters()` are the shards."""
    if world_size() > 1:
        model.reshard()  # type: ignore[operator]


def own_rows(x: Tensor) -> Tensor:
    """This process's part of a tensor that all have whole, split along the first dimension."""
    if world_size() == 1:
        return x
    parts = x.chunk(world_size())
    return parts[rank()] if rank() < len(parts) else x[:0]


def all_rows(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The whole [*shape] tensor of which each process has `own_rows`."""
    if world_size() == 1:
        return x
    whole: Tensor = _as_sharded(x, shape).full_tensor()
    return whole


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of x over the processes, in every one of them."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def save_sharded(tensors: Mapping[str, Tensor], rows: Mapping[str, int], path: Path) -> None:
    """Write states by torch.distributed.checkpoint, each process its own part.

    Args:
        tensors: this process's parts. Those of two or more dimensions are split by rows, the others
            the same everywhere.
        rows: the rows of each split tensor over all processes.
        path: directory to write.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    save(_sharded(tensors, rows), checkpoint_id=str(path))


def load_sharded_(tensors: Mapping[str, Tensor], rows: Mapping[str, int], path: Path) -> None:
    """Fill `tensors` from what any number of processes wrote with `save_sharded`."""
    from torch.distributed.checkpoint.state_dict_loader import load

    load(_sharded(tensors, rows), checkpoint_id=str(path))


def _sharded(tensors: Mapping[str, Tensor], rows: Mapping[str, int]) -> dict[str, Any]:
    if world_size() == 1:
        return dict(tensors)
    return {
        name: _as_sharded(x, (rows[name], *x.shape[1:])) if x.dim() >= 2 else x
        for name, x in tensors.items()
    }


def _as_sharded(x: Tensor, shape: tuple[int, ...]) -> Any:
    """The DTensor of global `shape` whose rows here are x; shares x's memory."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh(x.device.type, (world_size(),))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        x, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
    )
