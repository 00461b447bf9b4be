"""The C++ backend: tensors in, pointers out.

`proxsparse._cpu` is built without libtorch and knows only addresses, sizes and dtype codes; this
file is the whole of what joins it to PyTorch. Each function has the positional signature of its
op's schema in `ops.py` and the meaning of the function of that name in `reference.py`. Arithmetic
is in float32; results do not depend on the number of threads (`torch.get_num_threads()`).

Importing this module raises ImportError, with the reason, when the extension was not built.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from proxsparse.backends.build_notes import why_left_out
from proxsparse.errors import ProxsparseError

try:
    from proxsparse import _cpu
except ImportError as error:
    _reason = why_left_out("cpu") or str(error)
    raise ImportError(f"the C++ extension was not built: {_reason}") from error

# The codes of `Dtype` in csrc/cpu/tensor_view.h.
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def _operand(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), _CODES[x.dtype])


def prox_2to4_cpu(z: Tensor, lam: Tensor) -> Tensor:
    """See `reference.prox_2to4`; [..., K] to a new [..., K] of z's dtype."""
    out = torch.empty_like(z)
    _cpu.prox_2to4(_operand(z), _operand(out), z.numel(), lam.item(), torch.get_num_threads())
    return out


def project_2to4_cpu(w: Tensor, score: Tensor | None) -> Tensor:
    """See `reference.project_2to4`; [..., K] to a new [..., K] of w's dtype."""
    out = torch.empty_like(w)
    ranked = _operand(w if score is None else score)
    _cpu.project_2to4(_operand(w), ranked, _operand(out), w.numel(), torch.get_num_threads())
    return out


def mask_2to4_cpu(score: Tensor) -> Tensor:
    """See `reference.mask_2to4`; [..., K] to bool [..., K]."""
    out = torch.empty_like(score, dtype=torch.bool)
    _cpu.mask_2to4(_operand(score), out.data_ptr(), score.numel(), torch.get_num_threads())
    return out


def is_2to4_cpu(w: Tensor) -> Tensor:
    """See `reference.is_2to4`; [..., K] to a 0-d bool tensor."""
    return torch.tensor(_cpu.is_2to4(_operand(w), w.numel(), torch.get_num_threads()))


def pack_2to4_cpu(w: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.pack_2to4`; [..., K] to values [..., K/2] and uint8 codes [..., ceil(K/8)]."""
    *lead, k = w.shape
    values = w.new_empty(*lead, k // 2)
    codes = w.new_empty(*lead, (k + 7) // 8, dtype=torch.uint8)
    addresses = values.data_ptr(), codes.data_ptr()
    _cpu.pack_2to4(_operand(w), *addresses, math.prod(lead), k, torch.get_num_threads())
    return values, codes


def unpack_2to4_cpu(values: Tensor, codes: Tensor) -> Tensor:
    """See `reference.unpack_2to4`; values [..., K/2] and codes to a new [..., K]."""
    *lead, half = values.shape
    if list(codes.shape) != [*lead, (half + 3) // 4] or codes.dtype != torch.uint8 or half % 2:
        # The C++ loop reads as many codes as values ask for, whoever calls the op.
        raise ProxsparseError(
            f"values {list(values.shape)} need uint8 codes {[*lead, (half + 3) // 4]}, not "
            f"{codes.dtype} {list(codes.shape)}"
        )
    values, codes = values.contiguous(), codes.contiguous()
    out = values.new_empty(*lead, 2 * half)
    addresses = codes.data_ptr(), out.data_ptr()
    _cpu.unpack_2to4(
        _operand(values), *addresses, math.prod(lead), 2 * half, torch.get_num_threads()
    )
    return out


def prox_adamw_cpu(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: Tensor,
    lam: Tensor,
    grad_scale: Tensor,
    w0: Tensor | None,
    lam2: float,
    reg_eps: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """See `reference.prox_adamw_`; updates p, m and v in one pass, any mix of floating dtypes."""
    _cpu.prox_adamw(
        *(_operand(x) for x in (p, grad, m, v)),
        p.numel(),
        *(x.item() for x in (step, lr, lam, grad_scale)),
        _operand(w0),
        *(lam2, reg_eps, beta1, beta2, eps, weight_decay),
        torch.get_num_threads(),
    )


def gate_update_cpu(
    s: Tensor,
    grad: Tensor,
    w0: Tensor,
    m: Tensor,
    v: Tensor,
    act_norm: Tensor,
    step: Tensor,
    lr: Tensor,
    lam: Tensor,
    grad_scale: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    out: Tensor | None,
    hard: bool,
    scales: None = None,
    seed: int = 0,
) -> None:
    """See `reference.gate_update_`; updates s, m, v (and out) in one pass, any floating dtypes.

    States of 8 bits, and with them scales and seed, are left to the reference.
    """
    _cpu.gate_update(
        *(_operand(x) for x in (s, grad, w0, m, v, act_norm, out)),
        s.numel(),
        *s.shape[-2:],
        *(x.item() for x in (step, lr, lam, grad_scale)),
        *(beta1, beta2, eps, hard),
        torch.get_num_threads(),
    )


def gate_project_cpu(s: Tensor, w0: Tensor, act_norm: Tensor, out: Tensor) -> None:
    """See `reference.gate_project_`; writes out in one pass, any floating dtypes."""
    _cpu.gate_project(
        *(_operand(x) for x in (s, w0, act_norm, out)),
        *(s.numel(), *s.shape[-2:], torch.get_num_threads()),
    )
