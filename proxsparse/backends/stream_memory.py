"""Workspaces and signals of a stream, or of what is captured in a CUDA graph.

Memory comes from PyTorch's allocator, on the stream that is current. A stream has one workspace,
reused by its calls in order; a call that is captured in a CUDA graph takes one from the graph's own
memory instead, so that a replay shares it with nobody. Likewise signals, by which blocks of the
kernel for many tokens wait for each other: they are zeros between launches, so what is captured
takes some from a stock that was made before, and keeps them. Where all graphs of a stream are
promised to run one after the other, they keep the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from proxsparse.backends.cusparselt import extension as _cuda


def current_stream(device: int) -> int:
    """The current stream, as an address; torch.cuda.current_stream would make an object of it."""
    return torch._C._cuda_getCurrentRawStream(device)


class _Memory(NamedTuple):
    """What launches on one stream share, because they run one after the other."""

    signals: int  # address; 0 where there are none
    workspace: Tensor | None = None
    address: int = 0  # of the workspace
    size: int = 0  # its bytes


_SIGNALS = 8  # for each multiprocessor
_SIGNALS_IN_STOCK = 256  # for streams and graphs, until more are made
_signal_memory: list[Tensor] = []  # for ever, because graphs know its addresses
_stock_of_signals: dict[int, list[int]] = {}
_signals_of_captures: dict[tuple[int, int], tuple[int, int]] = {}  # the last on each stream
# Device -> stream -> those of all its captures, where they are promised to run one by one.
_serial_signals: dict[int, dict[int, int]] = {}
_memories: dict[tuple[int, int], _Memory] = {}  # by device and stream
# What captures the current stream, 0 if nothing does.
_capture_of: Callable[[int], int] = (
    _cuda.capture_of if _cuda.has_kernels else lambda _: torch.cuda.is_current_stream_capturing()
)


def memory_of(device: int, stream: int) -> _Memory:
    """What a launch on the current stream may use; see the top of the file."""
    capture = _capture_of(stream)
    if capture:
        return _Memory(_signals_of_capture(capture, device, stream))
    held = _memories.get((device, stream))
    if held is None:
        held = _memories[device, stream] = _Memory(_take_signals(device))
    return held


def grow(memory: _Memory, size: int, device: int, stream: int) -> _Memory:
    """The same with a workspace of so many bytes, on the current stream.

    The one before is freed in the order of the stream, after the launches that use it; so who is
    about to launch holds on to what it got, because another thread may grow it meanwhile.
    """
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    grown = _Memory(memory.signals, workspace, workspace.data_ptr(), size)
    if _memories.get((device, stream)) is memory:  # not what is captured
        _memories[device, stream] = grown
    return grown


def _take_signals(device: int) -> int:
    """Address of signals for a stream, of which the stock is filled up first."""
    if not _cuda.has_kernels or torch.cuda.get_device_capability(device)[0] != 9:
        return 0  # no kernel uses them
    stock = _stock_of_signals.setdefault(device, [])
    if len(stock) < 2:  # one is left for a capture
        size = _SIGNALS * torch.cuda.get_device_properties(device).multi_processor_count
        made = torch.zeros(_SIGNALS_IN_STOCK, size, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()
        _signal_memory.append(made)
        stock += [row.data_ptr() for row in made]
    return stock.pop()


def promise_serial_replay(device: int) -> None:
    """See `ops.promise_serial_replay`; makes sure that the next capture finds signals in stock."""
    if device not in _serial_signals:
        _serial_signals[device] = {}
        with torch.cuda.device(device):
            memory_of(device, current_stream(device))


def _signals_of_capture(capture: int, device: int, stream: int) -> int:
    """Address of the signals of what is captured on one stream; 0 if the stock was empty."""
    serial = _serial_signals.get(device)
    if serial is not None and stream in serial:
        return serial[stream]
    known, held = _signals_of_captures.get((device, stream), (0, 0))
    # What was captured there before the promise may run at any time.
    if known != capture:
        stock = _stock_of_signals.get(device, [])
        held = stock.pop() if stock else 0
        _signals_of_captures[device, stream] = capture, held
        if not stock:
            _memories.clear()  # so the next call outside a capture fills the stock up
        if serial is not None and held:
            serial[stream] = held
    return held
