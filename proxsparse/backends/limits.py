"""What each kernel can take, or in words why not."""

from __future__ import annotations

import importlib.util

import torch

from proxsparse.backends import cusparselt
from proxsparse.backends.cusparselt import extension as _cuda
from proxsparse.ops.reference import MAX_DECODE_TOKENS

# The codes of `ValueType` in csrc/cuda/cusparselt_product.h.
CODES = {torch.bfloat16: 0, torch.float16: 1}
_MULTIPLE = 16  # that cuSPARSELt needs of both dimensions of a 16-bit structured weight
MAX_HOPPER_TOKENS = 256  # of the kernel for few tokens on Hopper; elsewhere MAX_DECODE_TOKENS
_DECODE_MULTIPLE = 64  # that our kernels need of in_features
_PREFILL_MULTIPLE = 8  # and the one for many tokens of out_features
_FP8_MULTIPLE = 128  # that they need of in_features in FP8


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


def can_decode(k: int, tokens: int, dtype: torch.dtype, device: int) -> str:
    """Why no kernel for few tokens can run here; empty when one can.

    Ours is in the extension if nvcc was there when it was built; if not, Triton's stands in.
    """
    if not _cuda.has_kernels and importlib.util.find_spec("triton") is None:
        return "the extension was built without its CUDA kernels, and Triton is not installed"
    if dtype not in CODES:
        return f"it takes bfloat16 and float16, and the weight is {dtype}"
    multiple = _DECODE_MULTIPLE if _cuda.has_kernels else 8
    if k % multiple:
        return f"in_features must be a multiple of {multiple}, and is {k}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, and this GPU has {capability}"
    is_hopper = _cuda.has_kernels and capability[0] == 9
    most = MAX_HOPPER_TOKENS if is_hopper else MAX_DECODE_TOKENS
    if tokens > most:
        return f"it takes at most {most} tokens, and there are {tokens}"
    return ""


def can_prefill(n: int, k: int, tokens: int, dtype: torch.dtype, device: int) -> str:
    """Why our kernel for many tokens cannot run here; empty when it can."""
    if not _cuda.has_kernels:
        return "the extension was built without its CUDA kernels"
    if dtype not in CODES:
        return f"it takes bfloat16 and float16, and the weight is {dtype}"
    reason = _why_not_on_hopper(n, k, _DECODE_MULTIPLE, device)
    if not reason and tokens <= MAX_DECODE_TOKENS:
        return f"the kernel for few tokens takes {tokens}"
    return reason


def can_multiply_fp8(
    n: int, k: int, tokens: int, dtype: torch.dtype, device: int, most: int | None
) -> str:
    """Why one of our FP8 kernels, for at most so many tokens, cannot run; empty when it can."""
    if not _cuda.has_kernels:
        return "the extension was built without its CUDA kernels"
    if dtype not in CODES:
        return f"its results are bfloat16 or float16, and the tokens are {dtype}"
    reason = _why_not_on_hopper(n, k, _FP8_MULTIPLE, device)
    if not reason and most is not None and tokens > most:
        return f"it takes at most {most} tokens, and there are {tokens}"
    return reason


def _why_not_on_hopper(n: int, k: int, multiple: int, device: int) -> str:
    """Why a weight [n, k] has no place in our kernels for Hopper; empty when it has."""
    if k % multiple or n % _PREFILL_MULTIPLE:
        return (
            f"in_features must be a multiple of {multiple} and out_features one of "
            f"{_PREFILL_MULTIPLE}, and the weight is [{n}, {k}]"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return f"it is for compute capability 9.0, and this GPU has {capability}"
    return ""
