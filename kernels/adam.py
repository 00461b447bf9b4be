"""Adam's moments, shared by the update kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import reciprocal, reciprocal_root, square_root


@triton.jit
def bias_corrections(step, log_beta1, log_beta2):
    """(1/(1 - beta1^step), 1/sqrt(1 - beta2^step)), given the logarithms of the betas."""
    m_scale = reciprocal(_one_minus_exp(step * log_beta1))
    v_scale = reciprocal_root(_one_minus_exp(step * log_beta2))
    return m_scale, v_scale


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0; near 0, where beta2 is for its first steps, without cancellation."""
    series = 1.0 + x * (1.0 / 3.0 + x * (1.0 / 12.0 + x * (1.0 / 60.0 + x / 360.0)))
    return tl.where(x > -0.25, -x * (1.0 + 0.5 * x * series), 1.0 - tl.exp(x))


@triton.jit
def adam(grad, m, v, share1, share2, eps, v_scale):
    """New moments, and the direction before the scaling by m_scale; everything fp32.

    What is new of a moment, 1 - beta, comes as such: a beta2 of 0.999 in fp32 leaves 1.3e-5 too
    little of it.
    """
    m = m + share1 * (grad - m)
    v = v + share2 * (grad * grad - v)
    return m, v, m * reciprocal(square_root(v) * v_scale + eps)
