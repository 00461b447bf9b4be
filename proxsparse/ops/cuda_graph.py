"""Recording a CUDA graph, and leaving PyTorch in order where that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def recording(stream: torch.cuda.Stream) -> Iterator[torch.cuda.CUDAGraph]:
    """Record what is queued inside the block as a graph; nothing of it runs yet.

    Args:
        stream: what to record on; work on it must be done, or be waited for by it.

    Yields:
        The graph, which can be replayed after the block.

    Raises:
        RuntimeError: what was queued cannot be recorded, or the device is out of memory. PyTorch is
            as it was before, unless the device itself is out of order.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            yield graph
    except RuntimeError as error:
        _tidy_up(stream, pool)
        if isinstance(error.__context__, RuntimeError):
            raise error.__context__ from error  # the end of the recording failed because of it
        raise


def _tidy_up(stream: torch.cuda.Stream, pool: Any) -> None:
    """Put right what torch leaves behind when the end of a recording fails.

    Its allocator still serves the recording, and its random generator believes to be in it.
    """
    index = stream.device.index
    with contextlib.suppress(RuntimeError):  # raised if the end of the recording did not fail
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())
    torch.cuda.synchronize(index)
