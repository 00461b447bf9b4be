"""A step of the loop as one CUDA graph: launched whole, not kernel by kernel.

A step of a small model is a thousand kernels of a few microseconds, and the host needs longer to
launch one than a GPU to run it. A graph records them once; from then on a step is one launch. What
the host decides while it records is decided for good, so a step that reads results back, to skip
experts without tokens say, is no graph: that shows in the eager steps before, which go on.

Memory: the activations and gradients of a step stay reserved between steps.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from proxsparse.ops.cuda_graph import recording

_log = logging.getLogger(__name__)

_EAGER_STEPS = 3  # before the recording: they compile kernels and make the libraries' workspaces

Step = Callable[[Tensor, Tensor], Tensor]


@contextlib.contextmanager
def as_graph(step: Step, device: torch.device) -> Iterator[Step]:
    """Within the context, what to call in place of `step`: it is the same, and soon a graph.

    The first calls are eager, the next one records the graph and all from there on run it. If a
    step cannot be recorded, all are eager, and the log says why.

    Args:
        step: a function of two tensors, the same shapes and dtypes in each call, that returns a
            0-d tensor and changes others in place. It gets them on `device`.
        device: a CUDA device; everything in the context is queued on one stream of it.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream), _whole_sequences():
            yield _StepGraph(step, device)
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)


class _StepGraph:
    """Calls a step with buffers that keep their place; see `as_graph`, which makes the stream."""

    def __init__(self, step: Step, device: torch.device) -> None:
        self.step = step
        self.device = device
        self.inputs: list[Tensor] = []
        self.num_calls = 0
        self.replay: Callable[[], Tensor] | None = None
        self.obstacle = ""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """One step; its result is a tensor of its own."""
        if not self.inputs:
            self.inputs = [torch.empty_like(x, device=self.device) for x in inputs]
        for own, x in zip(self.inputs, inputs, strict=True):
            own.copy_(x, non_blocking=True)
        self.num_calls += 1
        if self.num_calls == _EAGER_STEPS:
            with _waits_of_the_host() as places:
                result = self.step(*self.inputs)
            if places:
                self._stay_eager(f"the host waits for the GPU at {places[0]}")
            return result
        if self.num_calls > _EAGER_STEPS and self.replay is None and not self.obstacle:
            self.replay = self._record()
        return self.step(*self.inputs) if self.replay is None else self.replay()

    def _record(self) -> Callable[[], Tensor] | None:
        """Capture the step, of which nothing is run yet; None if it cannot be captured."""
        stream = torch.cuda.current_stream(self.device)
        try:
            with recording(stream) as graph:
                result = self.step(*self.inputs)
        except RuntimeError as error:
            self._stay_eager(str(error).split("\n")[0])
            return None

        def replay() -> Tensor:
            graph.replay()
            return result.clone()

        return replay

    def _stay_eager(self, obstacle: str) -> None:
        self.obstacle = obstacle
        _log.info("a step is launched kernel by kernel, not as one CUDA graph: %s", obstacle)


@contextlib.contextmanager
def _waits_of_the_host() -> Iterator[list[str]]:
    """Lists where, within the context, the host waited for the GPU, as "file:line".

    An attempt to capture such a step would fail in the middle, and leave torch in disorder.
    """
    places: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in seen:
        if "called a synchronizing" in str(warning.message):
            places.append(f"{warning.filename}:{warning.lineno}")


@contextlib.contextmanager
def _whole_sequences() -> Iterator[None]:
    """Tell transformers that each block is one sequence, in the forwards of this thread.

    It would read that off the positions, for which the host has to wait; and in a capture, where it
    cannot, take the slower attention kernels that need a mask. A transformers without these
    functions is left as it is.
    """
    from transformers import masking_utils

    here = threading.get_ident()

    def find_none(position_ids: Tensor) -> Any:
        find = theirs["find_packed_sequence_indices"]
        return None if threading.get_ident() == here else find(position_ids)

    def reads_no_data(tensor: Any = None) -> Any:
        """Without a padding mask there is nothing to read, and a capture is as good as a run."""
        capturing = tensor is None and torch.cuda.is_current_stream_capturing()
        return not capturing and theirs["is_tracing"](tensor)

    ours = {"find_packed_sequence_indices": find_none, "is_tracing": reads_no_data}
    theirs = {name: getattr(masking_utils, name) for name in ours if hasattr(masking_utils, name)}
    try:
        for name in theirs:
            setattr(masking_utils, name, ours[name])
        yield
    finally:
        for name, function in theirs.items():
            setattr(masking_utils, name, function)
