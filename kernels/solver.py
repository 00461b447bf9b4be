"""The proximal operator of a group of four: order it, solve it, put it back in its order.

The arithmetic is fp32 for every storage dtype. The number of instructions is what matters here: at
the memory speed of a current GPU there is time for about a hundred per parameter, so the solver
takes few, well started Newton steps, approximate reciprocals, and ends with an exact sweep.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import ALL, reciprocal, square_root


@triton.jit
def _larger_first(x, y):
    """(max, min, whether they changed places); equal entries stay, the lower index first."""
    return tl.maximum(x, y, ALL), tl.minimum(x, y, ALL), y > x


@triton.jit
def _exchange(x, y, swap):
    return tl.where(swap, y, x), tl.where(swap, x, y)


@triton.jit
def prox_group(a, b, c, d, lam, SIGNED: tl.constexpr, STEPS: tl.constexpr):
    """The exact proximal operator of lam*R on groups (a, b, c, d), each [G] fp32.

        prox(z) = argmin_w  1/2 ||w - z||^2 + lam * R(w)

    On the box 0 <= w <= |z|, where the minimiser is, the row sums of R's Hessian are at most twice
    the sum of |z|. While lam times that stays below 1 in the whole tile the problem is convex
    there: coordinate descent finds the one minimum, in any order of the entries. Otherwise the
    candidates are compared, for which the two largest entries must be known. As a tile takes one of
    the two ways, a group's last bits can depend on the other groups of its tile.

    With SIGNED false the entries are known to be non-negative. STEPS, 2 or 3, is the number of
    iterations for each candidate: three meet fp32 rounding; two leave the objective within 3e-5 of
    the minimum, less than rounding the result to bfloat16 adds. Pruned entries are +0.0. One NaN in
    a group makes all four NaN, as the maxima and minima on its way propagate it.
    """
    if SIGNED:
        z1, z2, z3, z4 = tl.abs(a), tl.abs(b), tl.abs(c), tl.abs(d)
    else:
        z1, z2, z3, z4 = a, b, c, d
    # Bits of non-negative floats are ordered like the floats, and a warp's integer maximum is one
    # instruction. NaN comes out largest and takes the branch for the general case.
    bits = ((z1 + z2) + (z3 + z4)).to(tl.int32, bitcast=True)
    curvature = 2.0 * lam * tl.max(bits, 0).to(tl.float32, bitcast=True)
    if curvature < 1.0:
        w1, w2, w3, w4 = _sweep(z1, z2, z3, z1 + z2, z1, z2, z3, z4, lam)
        sweeps = STEPS + (5.0 * curvature).to(tl.int32)
        while sweeps > 0:
            w1, w2, w3, w4 = _sweep(w1, w2, w3, w1 + w2, z1, z2, z3, z4, lam)
            sweeps -= 1
    else:
        w1, w2, w3, w4 = _prox_any_order(z1, z2, z3, z4, lam, STEPS)
    if SIGNED:
        w1, w2, w3, w4 = _signed(w1, a), _signed(w2, b), _signed(w3, c), _signed(w4, d)
    return w1, w2, w3, w4


@triton.jit
def _sweep(x, y, u, pair, z1, z2, z3, z4, lam):
    """One sweep of exact coordinate minimisation over (v, u, y, x), given pair = x + y."""
    product = x * y
    v = tl.maximum(z4 - lam * (product + u * pair), 0.0, ALL)
    u = tl.maximum(z3 - lam * (product + v * pair), 0.0, ALL)
    pair, product = u + v, u * v
    y = tl.maximum(z2 - lam * (product + x * pair), 0.0, ALL)
    x = tl.maximum(z1 - lam * (product + y * pair), 0.0, ALL)
    return x, y, u, v


@triton.jit
def _prox_any_order(a, b, c, d, lam, STEPS: tl.constexpr):
    """The prox of non-negative entries: part the two largest from the others, solve, put back.

    Only which are the two largest matters to the solver, not their order, and which of the others
    is the larger: four comparisons instead of the five or six of a sort. Of equal entries the one
    with the lower index counts as the larger. Exchanges go by `>` and so respect that, but if c and
    d pass both a and b, the larger of these comes to stand last.
    """
    a, b, s1 = _larger_first(a, b)
    c, d, s2 = _larger_first(c, d)
    z1, z4, s3 = _larger_first(a, d)
    z2, z3, s4 = _larger_first(b, c)
    fourth_is_larger = (z4 > z3) | (s3 & (z4 >= z3))
    w1, w2, w3, w4 = _prox_parted(z1, z2, z3, z4, fourth_is_larger, lam, STEPS)
    a, d = _exchange(w1, w4, s3)
    b, c = _exchange(w2, w3, s4)
    a, b = _exchange(a, b, s1)
    c, d = _exchange(c, d, s2)
    return a, b, c, d


@triton.jit
def _signed(magnitude, like):
    """The sign of `like` on a magnitude >= 0; adding +0.0 turns -0.0 into +0.0."""
    sign = like.to(tl.uint32, bitcast=True) & 0x80000000
    return (magnitude.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True) + 0.0


@triton.jit
def _prox_parted(z1, z2, z3, z4, fourth_is_larger, lam, STEPS: tl.constexpr):
    """The prox of entries >= 0 of which neither of z1, z2 is smaller than either of z3, z4.

    Solved in units of 1/lam, where w1, w2 enter through their sum and difference only, so that
    their order does not matter, nor does that of w3, w4:

    * 3-sparse with the entry t beside w1, w2: w1 + w2 = (z1 + z2)/(1 + t) and
      w1 - w2 = (z1 - z2)/(1 - t), which leaves g(t) = t - max(z3, z4) + w1*w2 = 0. The first steps
      take the root of g's parabola, as near the threshold two roots are about to merge; a third is
      Newton's.
    * dense with the pair sums s = w1 + w2 and q = w3 + w4: w1 - w2 = (z1 - z2)/(1 - q) and
      w3 - w4 = (z3 - z4)/(1 - s), which leaves two equations for Newton. The start keeps
      s <= 1 - 0.18*(z3 + z4), where the Hessian is that of a minimum.

    `gain` is four times what a candidate's objective lies below the 2-sparse one's; with the
    differences above put in, few terms are left of it. It is the true value at the point reached,
    converged or not, and the sweep of exact coordinate steps at the end cannot raise the objective:
    a candidate that does not exist loses, or at worst is a valid point.
    """
    # lam = 0 must leave z as it is: the floor keeps 1/lam finite, and the sweep uses lam itself.
    unit = tl.maximum(lam, 1e-30)
    x1, x2, x3, x4 = z1 * unit, z2 * unit, z3 * unit, z4 * unit
    total, gap, low_total, low_gap = x1 + x2, x1 - x2, x3 + x4, x3 - x4

    # plus and minus are 1/(1 + t) and 1/(1 - t); slope = 2*g', curve = g''/3.
    third = tl.maximum(x3, x4)
    t = tl.minimum(tl.minimum(third, 0.25 * tl.minimum(x1, x2)), 0.3)
    for step in tl.static_range(STEPS):
        r = reciprocal(1.0 - t * t)
        plus, minus = r - t * r, r + t * r
        p, m = total * plus, gap * minus
        p, m = p * p, m * m
        if step < 2:
            p_plus, m_minus = p * plus, m * minus
            slope = 2.0 - p_plus - m_minus
            curve = p_plus * plus - m_minus * minus
            g4 = 4.0 * (t - third) + (p - m)
            root = square_root(slope * slope - 3.0 * (g4 * curve))
            t = t - g4 * reciprocal(slope + root)
        else:
            slope = 2.0 - p * plus - m * minus
            g2 = 2.0 * (t - third) + 0.5 * (p - m)
            t = t - g2 * reciprocal(slope)
    # Where the parabola has no root t is NaN, and its maximum with 0 is 0. At a 3-sparse minimum
    # gain = 2*t^2 * (1 - w1^2 - w2^2): with t above 1/sqrt(2) it cannot win.
    t = tl.minimum(tl.maximum(t, 0.0), 0.70711)
    r = reciprocal(1.0 - t * t)
    s3, delta3 = total * (r - t * r), gap * (r + t * r)
    gain3 = t * (4.0 * third - 2.0 * t - total * s3 + gap * delta3)
    wins = (gain3 > 0.0) & (s3 >= tl.abs(delta3))
    t, gain3 = tl.where(wins, t, 0.0), tl.where(wins, gain3, 0.0)
    s3, delta3 = tl.where(wins, s3, total), tl.where(wins, delta3, gap)

    bound = 1.0 - 0.18 * low_total
    s = tl.minimum(total, bound)
    q = (low_total - 0.5 * (s * s - gap * gap)) * reciprocal(1.0 + s)
    s = tl.minimum((total - 0.5 * q * q) * reciprocal(1.0 + q), bound)
    for _ in tl.static_range(STEPS):
        inv_s, inv_q = reciprocal(1.0 - s), reciprocal(1.0 - q)
        delta, d = gap * inv_q, low_gap * inv_s
        delta2, d2 = delta * delta, d * d
        f_s = (s - total) + q * s + 0.5 * (q * q - d2)
        f_q = (q - low_total) + q * s + 0.5 * (s * s - delta2)
        h_s = (1.0 + q) - d2 * inv_s
        h_q = (1.0 + s) - delta2 * inv_q
        cross = s + q
        inv_det = reciprocal(h_s * h_q - cross * cross)
        s, q = s - (h_q * f_s - cross * f_q) * inv_det, q - (h_s * f_q - cross * f_s) * inv_det
    delta, d = gap * reciprocal(1.0 - q), low_gap * reciprocal(1.0 - s)
    off = s - total
    gain4 = low_gap * d - off * off + q * (2.0 * low_total - q + gap * delta - s * (s + q))
    wins = (gain4 >= gain3) & (s >= tl.abs(delta)) & (q >= tl.abs(d))
    s, delta = tl.where(wins, s, s3), tl.where(wins, delta, delta3)
    q, d = tl.where(wins, q, t), tl.where(wins, d, tl.where(fourth_is_larger, -t, t))

    whole = reciprocal(unit)
    half = 0.5 * whole
    x, y, u = (s + delta) * half, (s - delta) * half, (q + d) * half
    return _sweep(x, y, u, s * whole, z1, z2, z3, z4, lam)
