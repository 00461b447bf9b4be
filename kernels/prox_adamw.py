"""AdamW and the exact 2:4 prox in one pass over the weight, its gradient and its moments."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .adam import adam, bias_corrections
from .arithmetic import reciprocal, round_to, scalar, widen
from .group import join_group, split_group
from .launch import (
    UPDATE_BLOCK,
    UPDATE_NUM_WARPS,
    by_value,
    on_device,
    solver_steps,
    vector_width,
)
from .rounding import random_bits, round_stochastic
from .solver import prox_group


@triton.jit(do_not_specialize=["seed"])
def _prox_adamw_kernel(
    p_ptr,
    grad_ptr,
    m_ptr,
    v_ptr,
    w0_ptr,
    master_ptr,
    step,
    lr,
    lam,
    grad_scale,
    seed,
    lam2,
    reg_eps,
    share1,
    share2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    n,
    STEPS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of BLOCK elements a program; w0, master and seed are None when not in use.

    g <- grad_scale*grad + lam2 * dF(p; w0);  m, v <- moments of g;
    p <- prox_{lam R}(p*(1 - lr*weight_decay) - lr * mhat / (sqrt(vhat) + eps))
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), VECTOR), VECTOR)
    mask = tl.max_constancy(offset < tl.minimum(n - start, BLOCK).to(tl.int32), VECTOR)
    grad = widen(tl.load(grad_ptr + start + offset, mask, 0.0))
    m = widen(tl.load(m_ptr + start + offset, mask, 0.0))
    v = widen(tl.load(v_ptr + start + offset, mask, 0.0))
    if master_ptr is None:
        p = widen(tl.load(p_ptr + start + offset, mask, 0.0))
    else:
        p = tl.load(master_ptr + start + offset, mask, 0.0)
    # Loaded before anything is stored: the compiler must not move a load across a store.
    count, rate, strength = scalar(step), scalar(lr), scalar(lam)

    grad *= scalar(grad_scale)
    if w0_ptr is not None:
        w0 = widen(tl.load(w0_ptr + start + offset, mask, 0.0))
        r = reciprocal(w0 + tl.where(w0 < 0, -reg_eps, reg_eps))
        grad += 2.0 * lam2 * (r * p * (p - w0)) * (r * (2.0 * p - w0))
    m_scale, v_scale = bias_corrections(count, log_beta1, log_beta2)
    m, v, direction = adam(grad, m, v, share1, share2, eps, v_scale)
    tl.store(m_ptr + start + offset, round_to(m, m_ptr.dtype.element_ty), mask)
    tl.store(v_ptr + start + offset, round_to(v, v_ptr.dtype.element_ty), mask)

    p = p * (1.0 - rate * weight_decay) - rate * m_scale * direction
    a, b, c, d = split_group(p, BLOCK)
    a, b, c, d = prox_group(a, b, c, d, strength, True, STEPS)
    w = join_group(a, b, c, d, BLOCK)
    if master_ptr is not None:
        tl.store(master_ptr + start + offset, w, mask)
    if seed is None:
        rounded = round_to(w, p_ptr.dtype.element_ty)
    else:
        bits = random_bits(seed, count, start, BLOCK)
        rounded = round_stochastic(w, bits, p_ptr.dtype.element_ty)
    tl.store(p_ptr + start + offset, rounded, mask)


def prox_adamw_triton(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: float | Tensor,
    lr: float | Tensor,
    lam: float | Tensor,
    grad_scale: float | Tensor,
    w0: Tensor | None,
    lam2: float,
    reg_eps: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    *,
    master: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """One AdamW step on the weights, then their proximal step, in place.

    Args:
        p: [..., K] contiguous parameter, float32, bfloat16 or float16; updated.
        grad: like p in shape, any of these dtypes, as m, v and w0.
        m: first moment; updated.
        v: second moment; updated.
        step: number of this step, from 1; step, lr, lam and grad_scale are floats or 0-d tensors,
            and those on the GPU are read by the kernel (no synchronisation; a captured graph sees
            new values).
        lr: learning rate.
        lam: proximal strength of this step.
        grad_scale: factor on grad.
        w0: the original weight; read when lam2 is not 0.
        lam2: strength of the frozen-weight regulariser.
        reg_eps: its eps.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        eps: AdamW's eps.
        weight_decay: decoupled.
        master: [..., K] float32 copy of a 16-bit p: it is what is updated, and p receives it
        rounded.
        seed: rounds a 16-bit p stochastically, with Philox numbers of (seed, step, position); None
            rounds to nearest.

    Cost: memory-bound: reads p (or master), grad, m, v (and w0), writes p, m, v (and master). No
    temporary memory. Deterministic for a seed.
    """
    n = p.numel()
    if not n:
        return
    frozen = w0 if lam2 != 0 else None
    with on_device(p):
        _prox_adamw_kernel[(triton.cdiv(n, UPDATE_BLOCK),)](
            p,
            grad,
            m,
            v,
            frozen,
            master,
            by_value(step),
            by_value(lr),
            by_value(lam),
            by_value(grad_scale),
            seed,
            lam2,
            reg_eps,
            1.0 - beta1,
            1.0 - beta2,
            math.log(beta1) if beta1 else -math.inf,
            math.log(beta2) if beta2 else -math.inf,
            eps,
            weight_decay,
            n,
            solver_steps(p if master is None else master),
            vector_width(n, p, grad, m, v, frozen, master),
            UPDATE_BLOCK,
            num_warps=UPDATE_NUM_WARPS,
        )
