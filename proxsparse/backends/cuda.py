"""The CUDA backend: tensors in, pointers out.

`proxsparse._cuda` is built without libtorch and knows only addresses, sizes and streams; this file
joins it to PyTorch, and picks, by `tuning`, what a call of `sparse_linear` runs on. That is decided
once per shape, range of token counts and set of weight forms; afterwards a call costs one look-up
before its launch.

Memory for results and workspaces comes from PyTorch's allocator, on the stream that is current. A
stream has one workspace, reused by its calls in order; a call that is captured in a CUDA graph
takes one from the graph's own memory instead, so that a replay shares it with nobody. Likewise
signals, by which blocks of the kernel for many tokens wait for each other: they are zeros between
launches, so what is captured takes some from a stock that was made before, and keeps them.

Importing this module raises ImportError, with the reason, when the extension was not built.
"""

from __future__ import annotations

import bisect
import contextvars
import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxsparse.backends import choice as tuning
from proxsparse.backends import cusparselt
from proxsparse.ops import reference
from proxsparse.backends.cusparselt import extension as _cuda
from proxsparse.errors import ProxsparseError

_log = logging.getLogger("proxsparse")

# The codes of `ValueType` in csrc/cuda/sparse_linear.h.
CODES = {torch.bfloat16: 0, torch.float16: 1}
_MULTIPLE = 16  # that cuSPARSELt needs of both dimensions of a 16-bit structured weight
_TOKENS_MULTIPLE = 8  # and of the token count of 16-bit activations
MAX_DECODE_TOKENS, MAX_HOPPER_TOKENS = 64, 256  # of the kernels for few tokens
_BUCKETS = frozenset(tuning.BUCKETS)
_DECODE_MULTIPLE = 64  # that our kernels need of in_features
_PREFILL_MULTIPLE = 8  # and the one for many tokens of out_features
_ALIGNMENT = 16  # bytes, of what kernels read
# Rows a block, chunks under way (1 few, 2 many), blocks that share the columns; see
# csrc/cuda/sparse_linear_decode.h. Tables refer to them by index.
DECODE_LAYOUTS = tuple(
    (rows, depth, splits)
    for rows, depth in ((64, 1), (64, 2), (128, 1), (128, 2), (256, 2), (256, 1))
    for splits in (1, 2, 4, 8)
)
# Rows and tokens of a tile, blocks that share tokens; see csrc/cuda/sparse_linear_prefill.h.
PREFILL_LAYOUTS = tuple(
    (rows, tokens, cluster)
    for rows, tokens in ((256, 192), (128, 256), (128, 128), (128, 64))
    for cluster in (1, 2)
)

# x, values, codes, bias, compressed, dense -> result
_Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]


def can_compress(n: int, k: int, dtype: torch.dtype) -> str:
    """Why a weight [n, k] of this dtype has no compressed form here; empty when it has one."""
    if dtype not in CODES:
        return f"cuSPARSELt is used for bfloat16 and float16, and the weight is {dtype}"
    if n <= 0 or k <= 0 or n % _MULTIPLE or k % _MULTIPLE:
        return (
            f"cuSPARSELt needs both dimensions of a 16-bit weight to be multiples of {_MULTIPLE}, "
            f"and this one is [{n}, {k}]"
        )
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"sparse tensor cores need compute capability 8.0, and this GPU has {capability}"
    found = cusparselt.find_library()
    return found if isinstance(found, str) else ""


def compress_2to4_cuda(w: Tensor) -> Tensor:
    """The form of a 2:4 weight that cuSPARSELt multiplies with.

    Args:
        w: [N, K], bfloat16 or float16, contiguous, on a CUDA device, N and K multiples of 16;
            already 2:4 (`ops.compress_2to4` checks it; neither this function nor the library does).

    Returns:
        uint8, 1-D, about 9/16 of w's bytes. Its layout is the library's own and may differ between
        versions: store `pack_2to4`'s form and make this one anew.

    Cost: memory-bound; nothing waits for it on the host.

    Raises:
        ProxsparseError: the weight cannot be compressed here, see `can_compress`.
        RuntimeError: the library failed; its text, the call and the shape are named.
    """
    n, k = w.shape
    reason = can_compress(n, k, w.dtype)
    if reason:
        raise ProxsparseError(f"compress_2to4 cannot run: {reason}")
    device, code = w.get_device(), CODES[w.dtype]
    w = _aligned(w)
    with torch.cuda.device(device):
        size, scratch_size = _cuda.compressed_size(device, code, n, k)
        compressed = w.new_empty(size, dtype=torch.uint8)
        scratch = w.new_empty(scratch_size, dtype=torch.uint8)
        addresses = w.data_ptr(), compressed.data_ptr(), scratch.data_ptr()
        _cuda.compress_2to4(device, code, n, k, *addresses, _stream(device))
    return compressed


def lay_out_2to4(values: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `ops.lay_out_2to4`.

    Cost: one pass over values and codes, and a few temporaries of twice the codes' size.
    """
    n, k, device = values.shape[0], 2 * values.shape[1], values.get_device()
    if not _cuda.has_decode or can_decode(k, 1, values.dtype, device) or not n:
        return values, codes, None
    tiles = reference.tile_codes(codes)
    size = values.numel() * values.element_size()
    buffer = torch.empty(size + tiles.numel(), dtype=torch.uint8, device=values.device)
    kept, tiled = buffer[:size].view(values.dtype).view_as(values), buffer[size:].view_as(tiles)
    kept.copy_(values)
    tiled.copy_(tiles)
    # The kernel for few tokens reads them ahead of its turn on the stream.
    torch.cuda.current_stream(device).synchronize()
    is_whole = n % 64 == 0 and not can_compress(n, k, values.dtype)
    return kept, tiled, buffer if is_whole and _is_compressed_so(device, values.dtype) else None


@functools.cache
def _is_compressed_so(device: int, dtype: torch.dtype) -> bool:
    """Whether cuSPARSELt's form of a weight is its values and, behind them, its codes in tiles.

    So it is on Hopper in the versions that were looked at, and nothing says that it stays so: a
    random weight is compressed and compared.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.cuda.device(device):
        score = torch.randn(128, 192, generator=generator).to(device)
        w = torch.where(reference.mask_2to4(score), score, 0).to(dtype)
        values, codes = reference.pack_2to4(w)
        parts = values.view(torch.uint8).flatten(), reference.tile_codes(codes).flatten()
        try:
            return torch.equal(compress_2to4_cuda(w), torch.cat(parts))
        except _cuda.LibraryError as error:
            _log.info("no weight is kept in cuSPARSELt's form: %s", error)
            return False


def sparse_linear_cuda(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    compressed: Tensor | None,
    dense: Tensor | None,
) -> Tensor:
    """See `reference.sparse_linear`; runs on what `tuning.choose` picks from the forms given.

    Args:
        x: [..., K], bfloat16 or float16; other dtypes run dense.
        values: [N, K/2] of x's dtype.
        codes: uint8 [N, ceil(K/8)], or in tiles, which the kernel for few tokens reads as they are.
        bias: [N] of x's dtype, or None.
        compressed: from `compress_2to4_cuda`, or None; needed to run on cuSPARSELt.
        dense: [N, K], or None; needed to run dense without unpacking first.

    Returns:
        [..., N] of x's dtype. A token count that is not a multiple of 8 is padded for cuSPARSELt:
        x is copied into a longer tensor and the result is the front part of one.

    Deterministic for a given choice of executor. Can be captured in a CUDA graph.

    Raises:
        ProxsparseError: dtypes or devices do not agree.
        RuntimeError: the library failed; its text, the call and the shapes are named.
    """
    n, half = values.shape
    if not x.numel() or not n:
        return torch.nn.functional.linear(x, x.new_zeros(n, 2 * half), bias)
    run = find_run(x, values, codes, bias, compressed, dense)
    device = x.get_device()
    if torch.cuda.current_device() == device:
        return run(x, values, codes, bias, compressed, dense)
    with torch.cuda.device(device):
        return run(x, values, codes, bias, compressed, dense)


def sparse_linear_group_cuda(x: Tensor, *forms: Sequence[Any]) -> list[Tensor]:
    """See `reference.sparse_linear_group`; what is left to the kernel for few tokens is one launch.

    Args:
        x: [..., K], as in `sparse_linear_cuda`.
        *forms: of each weight values, codes, bias, compressed and dense.

    Raises:
        ProxsparseError: dtypes or devices do not agree.
        RuntimeError: a launch failed; its text and the shapes are named.
    """
    weights = list(zip(*forms, strict=True))
    most = _cuda.MAX_DECODE_WEIGHTS if _cuda.has_decode else 1
    results: list[Tensor] = []
    with torch.cuda.device(x.device):
        for first in range(0, len(weights), most):
            together = weights[first : first + most]
            if _share_a_launch(x, together):
                results += _decode_together(x, [weight[:3] for weight in together])
            else:
                results += [sparse_linear_cuda(x, *weight) for weight in together]
    return results


def _share_a_launch(x: Tensor, weights: Sequence[tuple[Any, ...]]) -> bool:
    """Whether each product would run on our kernel for few tokens, on the weight as it lies."""
    is_plain = x.numel() > 0 and all(
        values.numel() and codes.dim() == 3 and _is_aligned(values) and _is_aligned(codes)
        for values, codes, *_ in weights
    )
    return is_plain and all(isinstance(find_run(x, *forms), Decode) for forms in weights)


def _decode_together(
    x: Tensor, weights: Sequence[tuple[Tensor, Tensor, Tensor | None]]
) -> list[Tensor]:
    """The products with values, codes and bias of each weight, in the layout the kernel chooses."""
    x, k = _aligned(x), x.shape[-1]
    results = [x.new_empty(*x.shape[:-1], values.shape[0]) for values, *_ in weights]
    operands = [
        (y.shape[-1], *(0 if t is None else t.data_ptr() for t in (*weight, y)))
        for weight, y in zip(weights, results, strict=True)
    ]
    _cuda.sparse_linear_group(
        CODES[x.dtype], x.numel() // k, k, x.data_ptr(), operands, True, _stream(x.get_device())
    )
    return results


def find_run(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    compressed: Tensor | None,
    dense: Tensor | None,
) -> _Run:
    """What runs for operands like these; called with x's device current, it may serve them.

    Raises:
        ProxsparseError: dtypes or devices do not agree.
    """
    n, half = values.shape
    tokens = x.numel() // (2 * half)
    # What must agree but differs is a key of its own, and refused when it is first seen.
    key = (
        *(x.get_device(), x.dtype, values.dtype, n, half),
        bisect.bisect_left(tuning.BUCKETS, tokens),
        tokens in _BUCKETS,  # the end of a range is decided by itself
        None if bias is None else bias.dtype,
        None if compressed is None else compressed.get_device(),
        None if dense is None else dense.dtype,
    )
    run: _Run | None = tuning.decisions.get(key)
    if run is None:
        run = tuning.decisions[key] = _decide(x, values, bias, compressed, dense, tokens)
    return run


def find_run_for_shape(x: Tensor, *forms: Any) -> _Run:
    """`find_run`, for x of exactly this shape: it has less to do at a call."""
    run = find_run(x, *forms)
    return run.for_shape(x.shape) if isinstance(run, _Kernel) else run


def _decide(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    compressed: Tensor | None,
    dense: Tensor | None,
    tokens: int,
) -> _Run:
    """Picks an executor for calls like this one."""
    device = x.get_device()
    for name, other in (("values", values), ("bias", bias), ("dense", dense)):
        if other is not None and (other.dtype != x.dtype or other.get_device() != device):
            raise ProxsparseError(
                f"x is {x.dtype} on {x.device}, but {name} is {other.dtype} on {other.device}: "
                "they must agree"
            )
    n, k = values.shape[0], 2 * values.shape[1]
    available = {name for name in RUNS if name != "dense" or dense is not None}
    record = None
    bucket = tuning.find_bucket(tokens)
    if not can_decode(k, bucket, x.dtype, device) and _is_right("decode", device):
        available.add("decode")
    if not can_prefill(n, k, bucket, x.dtype, device) and _is_right("prefill", device):
        available.add("prefill")
    if compressed is not None:
        reason = can_compress(n, k, x.dtype)
        if compressed.get_device() != device:
            reason = f"the compressed weight is on {compressed.device}, x on {x.device}"
        if reason:
            raise ProxsparseError(f"a compressed weight was given, but cannot be used: {reason}")
        available.add("cusparselt")
    if x.dtype in CODES and not isinstance(cusparselt.find_library(), str):
        _warn_of_version(device)
        name = str(x.dtype).removeprefix("torch.")
        cell = tuning.Cell(n, k, bucket, name, bias is not None)
        record = tuning.table_for(device).get(cell)
    if record is None and dense is not None and bucket > _decode_beats_dense_up_to(device):
        available.discard("decode")
    return executor(tuning.choose(record, tokens, available), device, x.dtype, n, k, bias)


@functools.cache
def _decode_beats_dense_up_to(device: int) -> int:
    """The tokens up to which the kernel for few of them is preferred unseen to a dense weight.

    On an H200 it was faster for every layer of a 7 to 70 B model, the other one on an H100 up to
    16 tokens. Triton's stand-in seldom is, and runs only where it was seen to be.
    """
    if not _cuda.has_decode:
        return 0
    return MAX_DECODE_TOKENS if torch.cuda.get_device_capability(device)[0] == 9 else 16


def executor(
    candidate: tuning.Candidate,
    device: int,
    dtype: torch.dtype,
    n: int,
    k: int,
    bias: Tensor | None,
) -> _Run:
    """The function that runs a candidate on [n, k] weights, with a bias like this one or without.

    It must be called with `device` current, and serves every token count.
    """
    if candidate.executor == "cusparselt":
        return CuSparseLt(candidate, device, dtype, n, k, bias is not None)
    if candidate.executor == "decode":
        if not _cuda.has_decode:
            return _run_decode_op
        layout = (0, 0, 0) if candidate.algorithm < 0 else DECODE_LAYOUTS[candidate.algorithm]
        return Decode(layout, device, dtype, n, k)
    if candidate.executor == "prefill":
        layout = (0, 0, 0) if candidate.algorithm < 0 else PREFILL_LAYOUTS[candidate.algorithm]
        return Prefill(layout, device, dtype, n, k)
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


RUNS: dict[str, _Run] = {"dense": _run_dense, "unpack": _run_unpacked}


class CuSparseLt:
    """Calls cuSPARSELt for one weight shape and algorithm."""

    def __init__(
        self,
        candidate: tuning.Candidate,
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
            rows = _aligned(x)
            result = out = x.new_empty(*lead, self._n)
        else:
            rows = x.new_empty(padded, self._k)
            rows[:tokens].copy_(x.reshape(tokens, self._k))
            out = x.new_empty(padded, self._n)
            result = out[:tokens].view(*lead, self._n)
        if bias is not None:
            bias = _aligned(bias)
        operands = (
            *(padded, compressed.data_ptr(), compressed.numel(), rows.data_ptr()),
            *(0 if bias is None else bias.data_ptr(), out.data_ptr()),
        )
        stream = _stream(self._device)
        memory = _memory(self._device, stream)
        needed = self.launch(*operands, memory.address, memory.size, stream)
        if needed:
            memory = _grow(memory, needed, self._device, stream)
            self.launch(*operands, memory.address, memory.size, stream)
        return result


class _Kernel:
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

    def for_shape(self, shape: torch.Size) -> _Run:
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
            and not (values_at | codes_at) % _ALIGNMENT
        )
        if not is_settled:  # copies are just being made
            values, codes = _aligned(values), _aligned(_tiles(codes))
            values_at, codes_at = values.data_ptr(), codes.data_ptr()
        if x_at % _ALIGNMENT or not x.is_contiguous():
            x = _aligned(x)
            x_at = x.data_ptr()
        out = x.new_empty(*shape)
        bias_at = 0 if bias is None else bias.data_ptr()
        tokens, stream = x.numel() // self._k, _stream(self._device)
        self._launch(tokens, x_at, values_at, codes_at, bias_at, out.data_ptr(), is_settled, stream)
        return out


class Decode(_Kernel):
    """Calls the kernel for few tokens."""

    def __init__(
        self, layout: tuple[int, int, int], device: int, dtype: torch.dtype, n: int, k: int
    ) -> None:
        super().__init__(device, n, k)
        self._launch = _cuda.Decode(CODES[dtype], n, k, *layout)


class Prefill(_Kernel):
    """Calls the kernel for many tokens."""

    def __init__(
        self, layout: tuple[int, int, int], device: int, dtype: torch.dtype, n: int, k: int
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
        memory = _memory(self._device, stream)
        needed = self._queue(*operands, memory.signals, memory.address, memory.size)
        if needed:
            memory = _grow(memory, needed, self._device, stream)
            self._queue(*operands, memory.signals, memory.address, memory.size)


def _tiles(codes: Tensor) -> Tensor:
    return codes if codes.dim() == 3 else reference.tile_codes(codes)


def _run_decode_op(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, *_: Any
) -> Tensor:
    # Of the op's backends Triton's is left; in a context of its own, as in `_run_unpacked`.
    op = torch.ops.proxsparse.sparse_linear_decode
    y: Tensor = contextvars.Context().run(op, x, values, codes, bias)
    return y


def can_decode(k: int, tokens: int, dtype: torch.dtype, device: int) -> str:
    """Why no kernel for few tokens can run here; empty when one can.

    Ours is in the extension if nvcc was there when it was built; if not, Triton's stands in.
    """
    if not _cuda.has_decode and importlib.util.find_spec("triton") is None:
        return "the extension was built without its CUDA kernels, and Triton is not installed"
    if dtype not in CODES:
        return f"it takes bfloat16 and float16, and the weight is {dtype}"
    multiple = _DECODE_MULTIPLE if _cuda.has_decode else 8
    if k % multiple:
        return f"in_features must be a multiple of {multiple}, and is {k}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, and this GPU has {capability}"
    is_hopper = _cuda.has_decode and capability[0] == 9
    most = MAX_HOPPER_TOKENS if is_hopper else MAX_DECODE_TOKENS
    if tokens > most:
        return f"it takes at most {most} tokens, and there are {tokens}"
    return ""


def can_prefill(n: int, k: int, tokens: int, dtype: torch.dtype, device: int) -> str:
    """Why our kernel for many tokens cannot run here; empty when it can."""
    if not _cuda.has_decode:
        return "the extension was built without its CUDA kernels"
    if dtype not in CODES:
        return f"it takes bfloat16 and float16, and the weight is {dtype}"
    if k % _DECODE_MULTIPLE or n % _PREFILL_MULTIPLE:
        return (
            f"in_features must be a multiple of {_DECODE_MULTIPLE} and out_features one of "
            f"{_PREFILL_MULTIPLE}, and the weight is [{n}, {k}]"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return f"it is for compute capability 9.0, and this GPU has {capability}"
    if tokens <= MAX_DECODE_TOKENS:
        return f"the kernel for few tokens takes {tokens}"
    return ""


def _sparse_linear_decode(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.sparse_linear_decode`; x of 1 to 64 tokens, bfloat16 or float16.

    Raises:
        ProxsparseError: the kernel cannot take this shape or dtype.
        RuntimeError: the launch failed; its text and the shapes are named.
    """
    n, half = values.shape
    if not x.numel():
        return x.new_empty(*x.shape[:-1], n)
    reason = can_decode(2 * half, x.numel() // (2 * half), x.dtype, x.get_device())
    if reason:
        raise ProxsparseError(f"sparse_linear_decode cannot run: {reason}")
    with torch.cuda.device(x.device):
        return Decode((0, 0, 0), x.get_device(), x.dtype, n, 2 * half)(x, values, codes, bias)


if _cuda.has_decode:  # without it the op runs on Triton
    sparse_linear_decode_cuda = _sparse_linear_decode


def _is_right(executor: str, device: int) -> bool:
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
        run = executor(tuning.Candidate(name), device, torch.bfloat16, n, k, None)
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


def _aligned(x: Tensor) -> Tensor:
    """The tensor itself, or a copy where it is not contiguous from a multiple of 16 bytes."""
    return x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _is_aligned(x: Tensor) -> bool:
    return x.is_contiguous() and not x.data_ptr() % _ALIGNMENT


def _stream(device: int) -> int:
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
_memories: dict[tuple[int, int], _Memory] = {}  # by device and stream


# What captures the current stream, 0 if nothing does.
_capture_of: Callable[[int], int] = (
    _cuda.capture_of if _cuda.has_decode else lambda _: torch.cuda.is_current_stream_capturing()
)


def _memory(device: int, stream: int) -> _Memory:
    """What a launch on the current stream may use; see the top of the file."""
    capture = _capture_of(stream)
    if capture:
        return _Memory(_signals_of_capture(capture, device, stream))
    held = _memories.get((device, stream))
    if held is None:
        held = _memories[device, stream] = _Memory(_take_signals(device))
    return held


def _grow(memory: _Memory, size: int, device: int, stream: int) -> _Memory:
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
    if not _cuda.has_decode or torch.cuda.get_device_capability(device)[0] != 9:
        return 0  # no kernel uses them
    stock = _stock_of_signals.setdefault(device, [])
    if len(stock) < 2:  # one is left for a capture
        size = _SIGNALS * torch.cuda.get_device_properties(device).multi_processor_count
        made = torch.zeros(_SIGNALS_IN_STOCK, size, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()
        _signal_memory.append(made)
        stock += [row.data_ptr() for row in made]
    return stock.pop()


def _signals_of_capture(capture: int, device: int, stream: int) -> int:
    """Address of the signals of what is captured on one stream; 0 if the stock was empty."""
    known, held = _signals_of_captures.get((device, stream), (0, 0))
    if known != capture:
        stock = _stock_of_signals.get(device, [])
        held = stock.pop() if stock else 0
        _signals_of_captures[device, stream] = capture, held
        if not stock:
            _memories.clear()  # so the next call outside a capture fills the stock up
    return held


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
            tuning.Candidate("cusparselt"), device, dtype, size, size, True, is_bias_late=True
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


@functools.cache
def _warn_of_version(device: int) -> None:
    found = cusparselt.library()
    text = cusparselt.version_warning(found.version, torch.cuda.get_device_capability(device))
    if text:
        _log.warning("%s (%s)", text, found.path)
