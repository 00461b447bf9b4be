"""How each executor is called: dense, unpacked, cuSPARSELt, our kernels for few and many tokens.

An executor is made once for a weight's shape and serves every call of it, so whatever does not
depend on the operands is worked out when it is made. Each is checked against the definition before
its first use (`is_right`): a kernel that is wrong on this GPU is not used, and the log says so.
"""

from __future__ import annotations

import contextvars
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from proxsparse.backends import choice
from proxsparse.backends.cusparselt import extension as _cuda
from proxsparse.backends.limits import CODES, can_decode
from proxsparse.backends.stream_memory import current_stream, grow, memory_of
from proxsparse.backends.weight_forms import ALIGNMENT, aligned, compress_2to4_cuda, tiles_of

_log = logging.getLogger(__name__)

_TOKENS_MULTIPLE = 8  # that cuSPARSELt needs of the token count of 16-bit activations
# Rows a block, chunks under way (1 few, 2 many), blocks that share the columns; see
# csrc/cuda/sparse_linear_decode.h. Tables refer to them by index.
DECODE_LAYOUTS = tuple(
    (rows, depth, splits)
    for rows, depth in ((64, 1), (64, 2), (128, 1), (128, 2), (256, 2), (256, 1))
    for splits in (1, 2, 4, 8)
)
# Rows and tokens of a tile, blocks that share tokens, whether the weight is fetched ahead; see
# csrc/cuda/sparse_linear_prefill.h. Those behind the first eight are for 65 to some 1000 tokens,
# and not tuned with: no GPU has timed them yet.
PREFILL_LAYOUTS = (
    *(
        (rows, tokens, cluster, 0)
        for rows, tokens in ((256, 192), (128, 256), (128, 128), (128, 64))
        for cluster in (1, 2)
    ),
    *((128, tokens, cluster, 0) for tokens in (96, 160, 192) for cluster in (1, 2)),
    *((128, tokens, cluster, 1) for tokens in (64, 96, 128, 160, 192, 256) for cluster in (1, 2)),
)
NUM_TUNED_PREFILL_LAYOUTS = 8
# x, values, codes, bias, compressed, dense -> result
Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]


def executor(
    candidate: choice.Candidate,
    device: int,
    dtype: torch.dtype,
    n: int,
    k: int,
    bias: Tensor | None,
) -> Run:
    """The function that runs a candidate on [n, k] weights, with a bias like this one or without.

    It must be called with `device` current, and serves every token count.
    """
    if candidate.executor == "cusparselt":
        return CuSparseLt(candidate, device, dtype, n, k, bias is not None)
    if candidate.executor == "decode":
        if not _cuda.has_kernels:
            return _run_decode_op
        layout = (0, 0, 0) if candidate.algorithm < 0 else DECODE_LAYOUTS[candidate.algorithm]
        return Decode(layout, device, dtype, n, k)
    if candidate.executor == "prefill":
        tile = (0, 0, 0, 0) if candidate.algorithm < 0 else PREFILL_LAYOUTS[candidate.algorithm]
        return Prefill(tile, device, dtype, n, k)
    return RUNS[candidate.executor]


def _run_dense(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, _: Any, dense: Tensor | None
) -> Tensor:
    assert dense is not None
    return torch.nn.functional.linear(x, dense, bias)


def _run_unpacked(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    # In a context of its own, because a backend forced on the caller has no say in this: "cuda"
    # has no unpack_2to4.
    w = contextvars.Context().run(torch.ops.proxsparse.unpack_2to4, values, codes)
    return torch.nn.functional.linear(x, w, bias)


RUNS: dict[str, Run] = {"dense": _run_dense, "unpack": _run_unpacked}


class CuSparseLt:
    """Calls cuSPARSELt for one weight shape and algorithm."""

    def __init__(
        self,
        candidate: choice.Candidate,
        device: int,
        dtype: torch.dtype,
        n: int,
        k: int,
        has_bias: bool,
        is_bias_late: bool | None = None,
    ) -> None:
        if is_bias_late is None:
            is_bias_late = has_bias and _is_bias_late(device)
        self.launch = _cuda.SparseLinear(
            *(device, CODES[dtype], n, k, has_bias),
            *(candidate.algorithm, candidate.split_k, candidate.split_k_mode, is_bias_late),
        )
        self._device, self._n, self._k = device, n, k

    def __call__(
        self,
        x: Tensor,
        values: Tensor,
        codes: Tensor,
        bias: Tensor | None,
        compressed: Tensor | None,
        dense: Tensor | None,
    ) -> Tensor:
        """See `sparse_linear_cuda`."""
        assert compressed is not None
        tokens, lead = x.numel() // self._k, x.shape[:-1]
        padded = -tokens % _TOKENS_MULTIPLE + tokens
        if padded == tokens:
            rows = aligned(x)
            result = out = x.new_empty(*lead, self._n)
        else:
            rows = x.new_empty(padded, self._k)
            rows[:tokens].copy_(x.reshape(tokens, self._k))
            out = x.new_empty(padded, self._n)
            result = out[:tokens].view(*lead, self._n)
        if bias is not None:
            bias = aligned(bias)
        operands = (
            *(padded, compressed.data_ptr(), compressed.numel(), rows.data_ptr()),
            *(0 if bias is None else bias.data_ptr(), out.data_ptr()),
        )
        stream = current_stream(self._device)
        memory = memory_of(self._device, stream)
        needed = self.launch(*operands, memory.address, memory.size, stream)
        if needed:
            memory = grow(memory, needed, self._device, stream)
            self.launch(*operands, memory.address, memory.size, stream)
        return result


class Kernel:
    """One of our kernels, in one of its layouts, for one weight shape."""

    # Tokens; addresses of x, values, codes, bias and result; whether the weight may be read before
    # its turn on the stream; the stream.
    _launch: Callable[[int, int, int, int, int, int, bool, int], None]

    def __init__(self, device: int, n: int, k: int) -> None:
        self._device, self._n, self._k = device, n, k

    def __call__(
        self, x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, *_: Any
    ) -> Tensor:
        """See `sparse_linear_cuda`."""
        return self._run((*x.shape[:-1], self._n), x, values, codes, bias)

    def for_shape(self, shape: torch.Size) -> Run:
        """The same for x of one shape, with less to do at a call."""
        return functools.partial(self._run, (*shape[:-1], self._n))

    def _run(
        self,
        shape: tuple[int, ...],
        x: Tensor,
        values: Tensor,
        codes: Tensor,
        bias: Tensor | None,
        *_: Any,
    ) -> Tensor:
        x_at, values_at, codes_at = x.data_ptr(), values.data_ptr(), codes.data_ptr()
        is_settled = (  # codes in tiles: `lay_out_2to4` has waited for them, and for the values
            codes.dim() == 3
            and values.is_contiguous()
            and codes.is_contiguous()
            and not (values_at | codes_at) % ALIGNMENT
        )
        if not is_settled:  # copies are just being made
            values, codes = aligned(values), aligned(tiles_of(codes))
            values_at, codes_at = values.data_ptr(), codes.data_ptr()
        if x_at % ALIGNMENT or not x.is_contiguous():
            x = aligned(x)
            x_at = x.data_ptr()
        out = x.new_empty(*shape)
        bias_at = 0 if bias is None else bias.data_ptr()
        tokens, stream = x.numel() // self._k, current_stream(self._device)
        self._launch(tokens, x_at, values_at, codes_at, bias_at, out.data_ptr(), is_settled, stream)
        return out


class Decode(Kernel):
    """Calls the kernel for few tokens."""

    def __init__(
        self, layout: tuple[int, int, int], device: int, dtype: torch.dtype, n: int, k: int
    ) -> None:
        super().__init__(device, n, k)
        self._launch = _cuda.Decode(CODES[dtype], n, k, *layout)


class Prefill(Kernel):
    """Calls the kernel for many tokens."""

    def __init__(
        self, layout: tuple[int, int, int, int], device: int, dtype: torch.dtype, n: int, k: int
    ) -> None:
        super().__init__(device, n, k)
        self._queue = _cuda.Prefill(CODES[dtype], n, k, *layout)

    def _launch(
        self,
        tokens: int,
        x: int,
        values: int,
        codes: int,
        bias: int,
        out: int,
        is_settled: bool,
        stream: int,
    ) -> None:
        operands = tokens, x, values, codes, bias, out, is_settled, stream
        memory = memory_of(self._device, stream)
        needed = self._queue(*operands, memory.signals, memory.address, memory.size)
        if needed:
            memory = grow(memory, needed, self._device, stream)
            self._queue(*operands, memory.signals, memory.address, memory.size)


def _run_decode_op(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, *_: Any
) -> Tensor:
    # Of the op's backends Triton's is left; in a context of its own, as in `_run_unpacked`.
    op = torch.ops.proxsparse.sparse_linear_decode
    y: Tensor = contextvars.Context().run(op, x, values, codes, bias)
    return y


def is_right(executor: str, device: int) -> bool:
    """Whether a kernel computes what it should on this GPU; not asked while a graph is captured.

    Ours use instructions whose behaviour differs from GPU to GPU, so one look at their numbers
    comes before the first use.
    """
    return not torch.cuda.is_current_stream_capturing() and _probe(executor, device)


@functools.cache
def _probe(name: str, device: int) -> bool:
    n, k = 144, 5184  # ends within a tile; columns enough for blocks to share it
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-4, 5, (n, k), generator=generator).float()
    w[:, 2::4] = w[:, 1::4] = 0
    w = torch.cat((w[: n // 2], w[n // 2 :].flip(-1)))
    x = torch.randint(-3, 4, (200, k), generator=generator).float()
    exact = (x @ w.T).to(device, torch.bfloat16)  # whole numbers: every sum is exact
    with torch.cuda.device(device):
        packed = w.to(device, torch.bfloat16)
        values, codes = contextvars.Context().run(torch.ops.proxsparse.pack_2to4, packed)
        run = executor(choice.Candidate(name), device, torch.bfloat16, n, k, None)
        for tokens in (1, 9, 17, 64, 200):
            if name == "decode" and can_decode(k, tokens, torch.bfloat16, device):
                break
            rows = x[:tokens].to(device, torch.bfloat16)
            result = run(rows, values, codes, None, None, None)
            if not torch.equal(result, exact[:tokens]):
                _log.warning(
                    "the %s kernel is wrong on %s and is not used: please report it",
                    *(name, torch.cuda.get_device_name(device)),
                )
                return False
    return True


def _is_bias_late(device: int) -> bool:
    """Whether one plan serves every bias of a shape; not known yet while a graph is captured."""
    return not torch.cuda.is_current_stream_capturing() and _probe_bias(device)


@functools.cache
def _probe_bias(device: int) -> bool:
    """Asks the library whether it reads the bias pointer at each launch.

    Its documentation does not say. A zero weight shows the bias alone: the second of two launches
    with one plan has to show the second bias. If not, each bias gets a plan of its own.
    """
    size = 128
    dtype = torch.bfloat16
    with torch.cuda.device(device):
        w = torch.zeros(size, size, dtype=dtype, device=device)
        compressed = compress_2to4_cuda(w)
        run = CuSparseLt(
            choice.Candidate("cusparselt"), device, dtype, size, size, True, is_bias_late=True
        )
        biases = [torch.full((size,), value, dtype=dtype, device=device) for value in (1.0, 2.0)]
        try:
            results = [run(w, w, w, bias, compressed, None) for bias in biases]
        except _cuda.LibraryError as error:
            _log.info("every bias gets a plan of its own: %s", error)
            return False
        return all(
            torch.equal(result, bias.expand_as(result))
            for result, bias in zip(results, biases, strict=True)
        )
