"""One weight in every form that a kernel reads, and what alignment those need.

On Hopper one copy serves all: values and, behind them, codes in tiles are what our kernels read,
and also what cuSPARSELt calls a compressed weight. The latter is nowhere promised, so it is tried
before it is relied on.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from proxsparse.backends.cusparselt import extension as _cuda
from proxsparse.backends.limits import CODES, can_compress, can_decode
from proxsparse.backends.stream_memory import current_stream
from proxsparse.errors import ProxsparseError
from proxsparse.ops import reference

_log = logging.getLogger(__name__)

ALIGNMENT = 16  # bytes, of what kernels read


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
    w = aligned(w)
    with torch.cuda.device(device):
        size, scratch_size = _cuda.compressed_size(device, code, n, k)
        compressed = w.new_empty(size, dtype=torch.uint8)
        scratch = w.new_empty(scratch_size, dtype=torch.uint8)
        addresses = w.data_ptr(), compressed.data_ptr(), scratch.data_ptr()
        _cuda.compress_2to4(device, code, n, k, *addresses, current_stream(device))
    return compressed


def lay_out_2to4(values: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `ops.lay_out_2to4`.

    Cost: one pass over values and codes, and a few temporaries of twice the codes' size.
    """
    n, k, device = values.shape[0], 2 * values.shape[1], values.get_device()
    if not _cuda.has_kernels or can_decode(k, 1, values.dtype, device) or not n:
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


def tiles_of(codes: Tensor) -> Tensor:
    """The codes in tiles, as our kernels read them, whichever way they lie."""
    return codes if codes.dim() == 3 else reference.tile_codes(codes)


def aligned(x: Tensor) -> Tensor:
    """The tensor itself, or a copy where it is not contiguous from a multiple of 16 bytes."""
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def is_aligned(x: Tensor) -> bool:
    """Whether a kernel can read the tensor as it lies."""
    return x.is_contiguous() and not x.data_ptr() % ALIGNMENT
