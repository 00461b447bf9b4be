"""The fused step on the gates: gradient of the gate, Adam, prior, prox and the gated weight.

States are floats, or 8-bit to hold the gates of large models: s as a multiple of 1/255, m and the
root of v as codes with a scale per block of 256 elements. Rounding 8-bit states takes about as much
arithmetic as the step itself: they save memory, not time.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .adam import adam, bias_corrections
from .arithmetic import ALL, reciprocal, round_to, scalar, square_root, widen
from .gates import columns, gate_prior, keep_best
from .group import join_group, split_group
from .launch import (
    UPDATE_BLOCK,
    UPDATE_NUM_WARPS,
    by_value,
    on_device,
    solver_steps,
    vector_width,
)
from .rounding import QUANTUM_BLOCK, dequantize, quantize, random_bits, uniform
from .solver import prox_group


@triton.jit(do_not_specialize=["seed"])
def _gate_update_kernel(
    s_ptr,
    grad_ptr,
    w0_ptr,
    m_ptr,
    v_ptr,
    norm_ptr,
    out_ptr,
    scales_ptr,
    step,
    lr,
    lam,
    grad_scale,
    seed,
    share1,
    share2,
    log_beta1,
    log_beta2,
    eps,
    n,
    K,
    HARD: tl.constexpr,
    ROW_SPANS_TILE: tl.constexpr,
    STEPS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of BLOCK elements of one matrix a program; grid (tiles of N*K, matrices).

    ds = grad_scale*grad*w0;  m, v <- moments of ds;  A = max(|w0|*norm / RMS of the group, 1e-3);
    s <- clip(prox_{lam R}(A * clip(s - lr * mhat/(sqrt(vhat) + eps), 0, 1)) / A, 0, 1);
    out <- w0*s, or if HARD w0 at the two largest A*s of each group and +0.0 elsewhere.
    The states are 8-bit if scales_ptr is given.
    """
    first = tl.program_id(0).to(n.dtype) * BLOCK
    start = tl.program_id(1).to(tl.int64) * n + first
    offset = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), VECTOR), VECTOR)
    mask = tl.max_constancy(offset < tl.minimum(n - first, BLOCK).to(tl.int32), VECTOR)
    column = columns(first, K, ROW_SPANS_TILE, BLOCK)
    norm_ptr += tl.program_id(1).to(tl.int64) * K

    grad = widen(tl.load(grad_ptr + start + offset, mask, 0.0))
    frozen = tl.load(w0_ptr + start + offset, mask, 0.0)
    w0 = widen(frozen)
    m = widen(tl.load(m_ptr + start + offset, mask, 0))
    v = widen(tl.load(v_ptr + start + offset, mask, 0))
    s = widen(tl.load(s_ptr + start + offset, mask, 0))
    norm = widen(tl.load(norm_ptr + column))
    # Loaded before anything is stored: the compiler must not move a load across a store.
    count, rate, strength, grad_scale = scalar(step), scalar(lr), scalar(lam), scalar(grad_scale)
    if scales_ptr is not None:
        block = first // QUANTUM_BLOCK + tl.arange(0, BLOCK // QUANTUM_BLOCK)
        num_blocks = tl.cdiv(n, QUANTUM_BLOCK)
        scales_ptr += 2 * (tl.program_id(1).to(tl.int64) * num_blocks + block)
        m = dequantize(m, tl.load(scales_ptr, block < num_blocks, 0.0), BLOCK)
        root = dequantize(v, tl.load(scales_ptr + 1, block < num_blocks, 0.0), BLOCK)
        v = root * root
        s *= 1.0 / 255
        bits = random_bits(seed, count, start, BLOCK)

    a, b, c, d = gate_prior(w0, norm, BLOCK)
    m_scale, v_scale = bias_corrections(count, log_beta1, log_beta2)
    ds = grad * w0 * grad_scale
    m, v, direction = adam(ds, m, v, share1, share2, eps, v_scale)
    if scales_ptr is None:
        tl.store(m_ptr + start + offset, round_to(m, m_ptr.dtype.element_ty), mask)
        tl.store(v_ptr + start + offset, round_to(v, v_ptr.dtype.element_ty), mask)
    else:
        codes, unit = quantize(m, uniform(bits, 0), 127, BLOCK)
        tl.store(m_ptr + start + offset, codes.to(tl.int8), mask)
        tl.store(scales_ptr, unit, block < num_blocks)
        codes, unit = quantize(square_root(v), uniform(bits, 1), 255, BLOCK)
        # Never down to 0: the next step divides by this root.
        codes = tl.where(v > 0, tl.maximum(codes, 1.0), 0.0)
        tl.store(v_ptr + start + offset, codes.to(tl.uint8), mask)
        tl.store(scales_ptr + 1, unit, block < num_blocks)

    gate = tl.clamp(s - rate * m_scale * direction, 0.0, 1.0, ALL)
    ga, gb, gc, gd = split_group(gate, BLOCK)
    ga, gb, gc, gd = prox_group(a * ga, b * gb, c * gc, d * gd, strength, False, STEPS)
    ga, gb = _unscale(ga, a), _unscale(gb, b)
    gc, gd = _unscale(gc, c), _unscale(gd, d)
    s = join_group(ga, gb, gc, gd, BLOCK)
    if scales_ptr is None:
        rounded = round_to(s, s_ptr.dtype.element_ty)
        # Written like this, two bfloat16 products with w0 are one instruction.
        s = widen(rounded) if HARD else rounded.to(tl.float32)
    else:
        rounded = tl.floor(s * 255.0 + uniform(bits, 2)).to(tl.uint8)
        s = rounded.to(tl.float32) * (1.0 / 255)
    tl.store(s_ptr + start + offset, rounded, mask)
    if out_ptr is not None:
        gated = frozen.to(tl.float32) * s
        if HARD:
            gated = keep_best(frozen, s, a, b, c, d, BLOCK)
        tl.store(out_ptr + start + offset, round_to(gated, out_ptr.dtype.element_ty), mask)


@triton.jit
def _unscale(scaled, prior):
    return tl.minimum(scaled * reciprocal(prior), 1.0, ALL)


def gate_update_triton(
    s: Tensor,
    grad: Tensor,
    w0: Tensor,
    m: Tensor,
    v: Tensor,
    act_norm: Tensor,
    step: float | Tensor,
    lr: float | Tensor,
    lam: float | Tensor,
    grad_scale: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    out: Tensor | None = None,
    hard: bool = False,
    scales: Tensor | None = None,
    seed: int = 0,
) -> None:
    """One Adam step on the gates, then their proximal step in the metric of the prior, in place.

    Args:
        s: [..., N, K] contiguous gates in [0, 1], float32, bfloat16 or float16; updated. Or uint8
            with `scales`: multiples of 1/255.
        grad: [..., N, K] gradient with respect to the gated weight; any of these dtypes, as all
            below.
        w0: [..., N, K] frozen weight.
        m: like s, first moment; updated. int8 with `scales`.
        v: like s, second moment; updated. uint8 with `scales`: codes of its square root.
        act_norm: [..., K] norms behind the prior.
        step: number of this step, from 1; step, lr, lam and grad_scale are floats or 0-d tensors,
            and those on the GPU are read by the kernel (no synchronisation; a captured graph sees
            new values).
        lr: learning rate of the gates.
        lam: proximal strength of this step.
        grad_scale: factor on grad.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        eps: Adam's eps.
        out: like w0; receives the gated weight w0*s when given.
        hard: write w0 at the two largest A*s of each group into out instead, +0.0 elsewhere.
        scales: float32 [..., ceil(N*K/256), 2], zeros at first; updated. What a unit of m's and of
            v's codes stands for in each 256 elements of a matrix. Given, the states are 8-bit.
        seed: of the stochastic rounding of 8-bit states: Philox of (seed, step, position).

    Cost: memory-bound: reads grad, w0, s, m, v, writes s, m, v (and out). No temporary memory.
    Deterministic.
    """
    if not s.numel():
        return
    n, k = s.shape[-2] * s.shape[-1], s.shape[-1]
    with on_device(s):
        _gate_update_kernel[(triton.cdiv(n, UPDATE_BLOCK), s.numel() // n)](
            s,
            grad,
            w0,
            m,
            v,
            act_norm,
            out,
            scales,
            by_value(step),
            by_value(lr),
            by_value(lam),
            by_value(grad_scale),
            seed,
            1.0 - beta1,
            1.0 - beta2,
            math.log(beta1) if beta1 else -math.inf,
            math.log(beta2) if beta2 else -math.inf,
            eps,
            n,
            k,
            hard,
            k >= UPDATE_BLOCK,
            solver_steps(s) if scales is None else 2,
            vector_width(n, s, grad, w0, m, v, out),
            UPDATE_BLOCK,
            num_warps=UPDATE_NUM_WARPS,
        )
