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
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from proxsparse.errors import ProcessLost, ProxsparseError
from proxsparse.learning.launcher import check_meeting_point, require_one_process
from proxsparse.learning.launcher import is_main as is_main
from proxsparse.learning.launcher import rank as rank
from proxsparse.learning.launcher import world_size as world_size
from proxsparse.models.targets import Targets


def own_device(device: torch.device) -> torch.device:
    """`device`, or this process's own GPU where it means no GPU in particular."""
    if device.type == "cuda" and device.index is None and world_size() > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within the context the processes of the job can talk.

    Raises:
        ProxsparseError: the processes cannot find each other.
        ProcessLost: another process ended, so the job cannot go on.
    """
    if world_size() == 1:
        yield
        return
    check_meeting_point()
    rank()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise ProxsparseError(
            f"the {world_size()} processes of this job cannot find each other "
            f"({str(error).splitlines()[0]}): start them with torchrun"
        ) from error
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


def own_range(num_rows: int) -> tuple[int, int]:
    """The rows, from the first to before the second, that this process has of so many."""
    each = -(-num_rows // world_size())
    return min(rank() * each, num_rows), min((rank() + 1) * each, num_rows)


def own_rows(x: Tensor) -> Tensor:
    """This process's part of a tensor that all have whole, split along the first dimension."""
    start, stop = own_range(x.shape[0])
    return x[start:stop]


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


def check_joined(what: str) -> None:
    """Refuse to do what several processes can only do within `joined`.

    Raises:
        ProxsparseError: a launcher has started several, and they do not work together here.
    """
    if world_size() > 1 and not dist.is_initialized():
        require_one_process(what)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; `device` is where the processes exchange tensors."""
    if world_size() == 1:
        return flag
    return bool(sum_over_processes(torch.tensor(int(flag), device=device)).item())


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def _as_sharded(x: Tensor, shape: tuple[int, ...]) -> Any:
    """The DTensor of global `shape` whose rows here are x; shares x's memory."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh(x.device.type, (world_size(),))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        x, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
    )
