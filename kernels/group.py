"""What every kernel does with a group of four: take it apart, order it, solve it, put it back.

A tile of B elements is held as four tensors of B/4 entries, one per member of the group, so that a
thread has whole groups in its registers and no data moves between threads. The arithmetic is fp32
for every storage dtype. The number of instructions is what matters here: at the memory speed of a
current GPU there is time for about a hundred per parameter, so the solver takes few, well started
Newton steps, approximate reciprocals, and ends with an exact sweep.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter runs the same kernels with NumPy, but knows no inline assembly and rounds to
# bfloat16 by truncation, and gets its scalars as Python numbers; only the functions that ask for it
# here differ.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def split_group(x, BLOCK: tl.constexpr):
    """[BLOCK] -> the four members of its groups, each [BLOCK/4]."""
    low, high = tl.split(tl.reshape(x, [BLOCK // 4, 2, 2]))
    a, c = tl.split(low)
    b, d = tl.split(high)
    return a, b, c, d


@triton.jit
def join_group(a, b, c, d, BLOCK: tl.constexpr):
    """The inverse of `split_group`."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])


@triton.jit
def scalar(x):
    """A scalar argument in fp32, given by value or as a pointer to it in device memory."""
    if INTERPRETED:
        return tl.full([], x, tl.float32)
    elif x.dtype.is_ptr():
        return tl.load(x).to(tl.float32)
    else:
        return x.to(tl.float32)


@triton.jit
def reciprocal(x):
    """1/x within 1 ulp, in one instruction; subnormals count as zero."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal_root(x):
    """1/sqrt(x) within 2 ulp, in one instruction, for normal x > 0."""
    if INTERPRETED:
        return 1.0 / tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def square_root(x):
    """sqrt(x) within 1 ulp, in one instruction; subnormals count as zero."""
    if INTERPRETED:
        return tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Cast x to `dtype`, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(x == x, nearest, x).to(dtype)
    else:
        return x.to(dtype)


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
    candidates are compared, which needs the entries sorted. As a tile takes one of the two ways, a
    group's last bits can depend on the other groups of its tile.

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
        w1, w2, w3, w4 = z1, z2, z3, z4
        sweeps = STEPS + 1 + (5.0 * curvature).to(tl.int32)
        while sweeps > 0:
            w1, w2, w3, w4 = _sweep(w1, w2, w3, w4, z1, z2, z3, z4, lam)
            sweeps -= 1
    else:
        w1, w2, w3, w4 = _prox_any_order(z1, z2, z3, z4, lam, STEPS)
    if SIGNED:
        w1, w2, w3, w4 = _signed(w1, a), _signed(w2, b), _signed(w3, c), _signed(w4, d)
    return w1, w2, w3, w4


@triton.jit
def _sweep(x, y, u, v, z1, z2, z3, z4, lam):
    """One sweep of exact coordinate minimisation over (v, u, y, x)."""
    pair, product = x + y, x * y
    v = tl.maximum(z4 - lam * (product + u * pair), 0.0, ALL)
    u = tl.maximum(z3 - lam * (product + v * pair), 0.0, ALL)
    pair, product = u + v, u * v
    y = tl.maximum(z2 - lam * (product + x * pair), 0.0, ALL)
    x = tl.maximum(z1 - lam * (product + y * pair), 0.0, ALL)
    return x, y, u, v


@triton.jit
def _prox_any_order(a, b, c, d, lam, STEPS: tl.constexpr):
    """The prox of non-negative entries: sort, solve, and undo the sort.

    The network only exchanges neighbours, so equal entries keep their order.
    """
    z1, z2, s1 = _larger_first(a, b)
    z3, z4, s2 = _larger_first(c, d)
    z2, z3, s3 = _larger_first(z2, z3)
    z1, z2, s4 = _larger_first(z1, z2)
    z3, z4, s5 = _larger_first(z3, z4)
    z2, z3, s6 = _larger_first(z2, z3)
    w1, w2, w3, w4 = _prox_sorted(z1, z2, z3, z4, lam, STEPS)
    w2, w3 = _exchange(w2, w3, s6)
    w1, w2 = _exchange(w1, w2, s4)
    w3, w4 = _exchange(w3, w4, s5)
    w2, w3 = _exchange(w2, w3, s3)
    w1, w2 = _exchange(w1, w2, s1)
    w3, w4 = _exchange(w3, w4, s2)
    return w1, w2, w3, w4


@triton.jit
def _signed(magnitude, like):
    """The sign of `like` on a magnitude >= 0; adding +0.0 turns -0.0 into +0.0."""
    sign = like.to(tl.uint32, bitcast=True) & 0x80000000
    return (magnitude.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True) + 0.0


@triton.jit
def _prox_sorted(z1, z2, z3, z4, lam, STEPS: tl.constexpr):
    """The prox of z1 >= z2 >= z3 >= z4 >= 0.

    Solved in units of 1/lam, where w1, w2 enter through their sum and difference only:

    * 3-sparse with w3 = t: w1 + w2 = (z1 + z2)/(1 + t) and w1 - w2 = (z1 - z2)/(1 - t), which
      leaves
      g(t) = t - z3 + w1*w2 = 0. The first steps take the root of g's parabola, as near the
      threshold two roots are about to merge; a third is Newton's.
    * dense with the pair sums s = w1 + w2 and q = w3 + w4: w1 - w2 = (z1 - z2)/(1 - q) and
      w3 - w4 = (z3 - z4)/(1 - s), which leaves two equations for Newton. The start keeps
      s <= 1 - 0.18*(z3 + z4), where the Hessian is that of a minimum.

    `gain` is how far a candidate's objective lies below the 2-sparse one's. It is the true value at
    the point reached, converged or not, and the sweep of exact coordinate steps at the end cannot
    raise the
    objective: a candidate that does not exist loses, or at worst is a valid point.
    """
    # lam = 0 must leave z as it is: the floor keeps 1/lam finite, and the sweep uses lam itself.
    unit = tl.maximum(lam, 1e-30)
    x1, x2, x3, x4 = z1 * unit, z2 * unit, z3 * unit, z4 * unit
    total, gap, low_total, low_gap = x1 + x2, x1 - x2, x3 + x4, x3 - x4

    # g and its derivatives, all times four: g4 = 4*g, half_slope = 2*g', curve = 2*g''/3.
    t = tl.minimum(tl.minimum(x3, 0.35 * x2), 0.25)
    for step in tl.static_range(STEPS):
        r = reciprocal(1.0 - t * t)
        plus, minus = r - t * r, r + t * r
        p, m = total * plus, gap * minus
        p, m = p * p, m * m
        p_plus, m_minus = p * plus, m * minus
        half_slope = 2.0 - (p_plus + m_minus)
        g4 = 4.0 * (t - x3) + (p - m)
        if step < 2:
            curve = p_plus * plus - m_minus * minus
            root = square_root(tl.maximum(half_slope * half_slope - 3.0 * g4 * curve, 0.0))
            t = t - g4 * reciprocal(half_slope + root)
        else:
            t = t - 0.5 * g4 * reciprocal(half_slope)
    # At a 3-sparse minimum gain = t^2/2 * (1 - w1^2 - w2^2): with t above 1/sqrt(2) it cannot win.
    t = tl.minimum(tl.maximum(t, 0.0), 0.70711)
    r = reciprocal(1.0 - t * t)
    s3, delta3 = total * (r - t * r), gap * (r + t * r)
    x, y = s3 + delta3, s3 - delta3
    gain3 = t * (x3 - 0.25 * x * y - 0.125 * t * (4.0 + x * x + y * y))
    wins = (gain3 > 0.0) & (y >= 0.0)
    t, gain3 = tl.where(wins, t, 0.0), tl.where(wins, gain3, 0.0)
    s3, delta3 = tl.where(wins, s3, total), tl.where(wins, delta3, gap)

    bound = 1.0 - 0.18 * low_total
    s = tl.minimum(total, bound)
    q = tl.maximum((low_total - 0.5 * (s * s - gap * gap)) * reciprocal(1.0 + s), 0.0)
    s = tl.minimum((total - 0.5 * q * q) * reciprocal(1.0 + q), bound)
    for _ in tl.static_range(STEPS):
        one_s, one_q = 1.0 - s, 1.0 - q
        r = reciprocal(one_s * one_q)
        inv_s, inv_q = r * one_q, r * one_s
        delta, d = gap * inv_q, low_gap * inv_s
        delta2, d2 = delta * delta, d * d
        f_s = (s - total) + q * s + 0.5 * (q * q - d2)
        f_q = (q - low_total) + q * s + 0.5 * (s * s - delta2)
        h_s = (1.0 + q) - d2 * inv_s
        h_q = (1.0 + s) - delta2 * inv_q
        cross = s + q
        inv_det = reciprocal(h_s * h_q - cross * cross)
        s, q = s - (h_q * f_s - cross * f_q) * inv_det, q - (h_s * f_q - cross * f_s) * inv_det
    one_s, one_q = 1.0 - s, 1.0 - q
    r = reciprocal(one_s * one_q)
    delta, d = gap * (r * one_s), low_gap * (r * one_q)
    # Four times the objective, from terms of one sign each: nothing cancels.
    off_s, off_q, off_delta, off_d = s - total, q - low_total, q * delta, s * d
    objective = off_s * off_s + off_q * off_q + off_delta * off_delta + off_d * off_d
    y, v = s - tl.abs(delta), q - tl.abs(d)
    objective += y * (s + tl.abs(delta)) * q + v * (q + tl.abs(d)) * s
    gain4 = 0.25 * (low_total * low_total + low_gap * low_gap - objective)
    wins = (gain4 >= gain3) & (tl.minimum(y, v) >= 0.0)
    s, delta = tl.where(wins, s, s3), tl.where(wins, delta, delta3)
    q, d = tl.where(wins, q, t), tl.where(wins, d, t)

    half = 0.5 * reciprocal(unit)
    x, y = (s + delta) * half, (s - delta) * half
    u, v = (q + d) * half, (q - d) * half
    return _sweep(x, y, u, v, z1, z2, z3, z4, lam)
