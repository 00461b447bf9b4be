"""Every op of the package, in plain PyTorch: the definition that the fast backends must meet.

Nothing here is tuned. A C++ or Triton kernel is right when it agrees with these functions run in
float64; a reader who wants to know what an op means reads this file and no other.

Shapes: N out_features, K in_features, G = N*K/4 groups of four neighbours along the last dimension.
All ops take [..., K] with K a multiple of 4 and work on any torch device.

Sources: ProxSparse, Liu et al., ICML 2025, arXiv:2502.00258 (R, the proximal step and the
frozen-weight regulariser); Wanda, Sun et al., ICLR 2024, arXiv:2306.11695 (the importance behind
the gates); AdamW, Loshchilov and Hutter, ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Newton steps until the objective stops moving: measured over 10^6 groups per family, see
# tests/test_prox_2to4.py. Near-equal entries close to the transition are the slowest.
MAX_DECODE_TOKENS = 64  # of `sparse_linear_decode`
_NEWTON_STEPS = {torch.float64: 20, torch.float32: 9}
PRIOR_FLOOR = 1e-3
QUANTUM_BLOCK = 256  # elements of a matrix that share the scales of 8-bit moments
FP8 = torch.float8_e4m3fn  # e4m3: no infinities, NaN where exponent and fraction are all ones
FP8_MAX = 448.0
_SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: GPUs may flush smaller ones to zero


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic is done in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def regularizer_2to4(w: Tensor) -> Tensor:
    """R(w) of each group: the sum of the four products of three magnitudes.

    Zero exactly when at most two of the four entries are non-zero.

    Args:
        w: [..., K], any floating dtype.

    Returns:
        [..., K/4] in w's compute dtype.

    Source: arXiv:2502.00258, equation 3.
    """
    a, b, c, d = _groups(w).abs().unbind(-1)
    return a * b * (c + d) + c * d * (a + b)


def prox_2to4(z: Tensor, lam: float | Tensor) -> Tensor:
    r"""The exact proximal operator of R, group by group.

        prox(z) = argmin_w  1/2 ||w - z||^2 + lam * R(w)

    Signs and order of the magnitudes are those of z, so the problem is solved on

        z1 >= z2 >= z3 >= z4 >= 0    (ties: the lower index counts as the larger).

    The minimiser is 2-sparse, 3-sparse or dense, always on the largest entries. Each of the three
    candidates is found and the lowest objective kept.

    What is proven.

    *2-sparse* is (z1, z2, 0, 0).

    *3-sparse*: for a fixed third entry t the first two solve a linear system, which leaves

        g'(t) = t - z3 + lam * w1(t) * w2(t) = 0.

    An interior minimum has w2 >= lam * t * w1, and there g' is convex. So on [0, min(z3, t_c)],
    with t_c in closed form, Newton from the right end falls monotonically onto the only minimum
    there can be.

    *Dense*: with the pair sums S = w1 + w2 and q = w3 + w4 the differences are

        w1 - w2 = (z1 - z2) / (1 - lam * q)    and    w3 - w4 = (z3 - z4) / (1 - lam * S),

    which leaves a function of (S, q). Its Hessian is positive where sqrt(A * B) > lam * (S + q)
    with A and B concave: a convex set, so again there is at most one interior minimum.

    What is tested. That the 2-D Newton iteration (kept inside that convex set by falling half way
    back) arrives within its fixed number of steps: against multi-start coordinate descent in
    float64, on 10^6 random groups and on adversarial families, the objective is never above the
    best found by more than 1e-9 relative. A last sweep of exact coordinate steps cannot raise the
    objective and makes lam = 0 the identity.

    Args:
        z: [..., K], floating, K a multiple of 4.
        lam: regularisation strength >= 0, in units of 1/|z|; a float or a 0-d tensor. Only the
            product lam*z decides which entries survive.

    Returns:
        A new tensor like z. A group holding NaN becomes NaN.

    Cost: memory-bound when fused (read z, write w); this eager form makes some hundred passes.

    Source: problem and candidates, arXiv:2502.00258, section 3.3 (EnumALM); the solver is ours.
    """
    g = _groups(z)
    lam = torch.as_tensor(lam, dtype=g.dtype, device=g.device)
    mag, order = g.abs().sort(dim=-1, descending=True, stable=True)
    sorted_w = _prox_sorted(mag, lam, _NEWTON_STEPS[g.dtype])
    w = torch.empty_like(g).scatter_(-1, order, sorted_w)
    w = torch.where(w == 0, 0.0, w.copysign(g))
    w = torch.where(g.isnan().any(-1, keepdim=True), torch.nan, w)
    return w.reshape(z.shape).to(z.dtype)


def _prox_sorted(z: Tensor, lam: Tensor, steps: int) -> Tensor:
    """The prox of groups [..., 4] whose entries are non-negative and descending; like z."""
    z1, z2, z3, z4 = z.unbind(-1)
    zero = torch.zeros_like(z1)
    a, b = z1 + z2, z1 - z2

    # 3-sparse: Newton on t = w3, from the right end of the interval on which g' is convex.
    ratio = torch.where(a > 0, b / a, zero).sqrt()
    ceiling = (1 - ratio) / (1 + ratio)  # of lam * t
    t = torch.where(lam * z3 > ceiling, ceiling / lam, z3)
    for _ in range(steps):
        plus, minus = 1 / (1 + lam * t), 1 / (1 - lam * t).clamp_min(1e-6)
        p, m = (a * plus) ** 2 / 4, (b * minus) ** 2 / 4  # w1 * w2 = p - m
        slope = 1 - 2 * lam * lam * (p * plus + m * minus)
        t = torch.where(slope > 0, t - (t - z3 + lam * (p - m)) / slope, zero).clamp_min(0)
    total, delta = a / (1 + lam * t), b / (1 - lam * t).clamp_min(1e-6)
    x3 = _sweep(((total + delta) / 2, (total - delta) / 2, t, zero), (z1, z2, z3, zero), lam)

    # Dense: Newton on the pair sums S and q, half way back whenever a step leaves the convex set.
    c, e = z3 + z4, z3 - z4
    # The start keeps S where the Hessian is that of a minimum.
    bound = (1 / lam - 0.18 * c).clamp_min(0)
    s = torch.minimum(a, bound)
    q = ((c - lam * (s * s - b * b) / 2) / (1 + lam * s)).clamp_min(0)
    s = torch.minimum((a - lam * q * q / 2) / (1 + lam * q), bound)
    s_in, q_in = zero, zero  # the last point inside; the origin is, whenever a minimum exists
    for _ in range(steps):
        one_s, one_q = 1 - lam * s, 1 - lam * q
        delta, d = b / one_q, e / one_s
        f_s = s - a + lam * (q * s + (q * q - d * d) / 2)
        f_q = q - c + lam * (q * s + (s * s - delta * delta) / 2)
        h_s = 1 + lam * q - (lam * d) ** 2 / one_s
        h_q = 1 + lam * s - (lam * delta) ** 2 / one_q
        cross = lam * (s + q)
        det = h_s * h_q - cross * cross
        inside = (one_s > 0) & (one_q > 0) & (h_s > 0) & (det > 0)
        det = torch.where(inside, det, 1.0)
        s_new = torch.where(inside, s - (h_q * f_s - cross * f_q) / det, (s + s_in) / 2)
        q_new = torch.where(inside, q - (h_s * f_q - cross * f_s) / det, (q + q_in) / 2)
        s_in, q_in = torch.where(inside, s, s_in), torch.where(inside, q, q_in)
        s, q = s_new.clamp_min(0), q_new.clamp_min(0)
    inside = (lam * s < 1) & (lam * q < 1)
    s, q = torch.where(inside, s, s_in), torch.where(inside, q, q_in)
    delta, d = b / (1 - lam * q), e / (1 - lam * s)
    start = ((s + delta) / 2, (s - delta) / 2, (q + d) / 2, (q - d) / 2)
    x4 = _sweep(start, (z1, z2, z3, z4), lam)

    x2 = torch.stack((z1, z2, zero, zero), -1)
    o2, o3, o4 = (_objective(x, z, lam) for x in (x2, x3, x4))
    # Where Newton found no dense point, the sweep may have broken the order among ties.
    o4 = torch.where((s >= delta) & (q >= d) & (2 * s >= q), o4, torch.inf)
    # On equal objectives the denser one: only groups whose squares underflow are affected, and for
    # those the shrinkage is nil.
    best = torch.where((o3 < o2)[..., None], x3, x2)
    return torch.where((o4 <= torch.minimum(o2, o3))[..., None], x4, best)


def _sweep(w: tuple[Tensor, ...], z: tuple[Tensor, ...], lam: Tensor) -> Tensor:
    """One sweep of exact coordinate minimisation, smallest entry first; [...] -> [..., 4]."""
    x, y, u, v = (entry.clamp_min(0) for entry in w)
    v = (z[3] - lam * (x * y + u * (x + y))).clamp_min(0)
    u = (z[2] - lam * (x * y + v * (x + y))).clamp_min(0)
    y = (z[1] - lam * (x * u + v * (x + u))).clamp_min(0)
    x = (z[0] - lam * (y * u + v * (y + u))).clamp_min(0)
    return torch.stack((x, y, u, v), -1)


def _objective(w: Tensor, z: Tensor, lam: Tensor) -> Tensor:
    return (w - z).square().sum(-1) / 2 + lam * regularizer_2to4(w)[..., 0]


def mask_2to4(score: Tensor) -> Tensor:
    """True at the two entries of largest |score| in each group of four; ties keep the lower index.

    Args:
        score: [..., K], floating. Pass the weight itself for magnitude pruning, or any importance.

    Returns:
        bool [..., K] with exactly two True per group.
    """
    g = widened(score).reshape(*score.shape[:-1], score.shape[-1] // 4, 4).abs()
    keep = g.sort(dim=-1, descending=True, stable=True).indices[..., :2]
    return torch.zeros_like(g, dtype=torch.bool).scatter_(-1, keep, True).reshape(score.shape)


def project_2to4(w: Tensor, score: Tensor | None = None) -> Tensor:
    """The tensor w with all but the two best entries of each group set to exact +0.0.

    Args:
        w: [..., K], floating.
        score: [..., K] importance; None means |w|, the Euclidean projection onto the 2:4 set.

    Returns:
        A new tensor like w; kept entries are bitwise those of w.
    """
    bits = _movable(w)
    zero = torch.zeros((), dtype=bits.dtype, device=w.device)
    return torch.where(mask_2to4(w if score is None else score), bits, zero).view(w.dtype)


def is_2to4(w: Tensor) -> Tensor:
    """Whether every group of four has at most two non-zeros (NaN counts as non-zero); 0-d bool."""
    return (widened(w).reshape(-1, 4) != 0).sum(-1).le(2).all()


def widened(x: Tensor) -> Tensor:
    """The numbers in a dtype that PyTorch can compare everywhere."""
    return x.float() if x.dtype == FP8 else x


def _movable(x: Tensor) -> Tensor:
    """The bits in a dtype that PyTorch can select and scatter; `view(x.dtype)` is the way back."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


def mask_to_codes(mask: Tensor) -> Tensor:
    """The 4-bit code of each group, two groups a byte.

    Args:
        mask: bool [..., K] with exactly two True in each group of four.

    Returns:
        uint8 [..., ceil(K/8)]. A group's code is i | j << 2 for its kept positions i < j (the
        metadata order of sparse tensor cores); group 2b is the low nibble of byte b. A row with an
        odd number of groups ends in a zero nibble.
    """
    g = mask.reshape(*mask.shape[:-1], mask.shape[-1] // 4, 4).to(torch.uint8)
    position = torch.arange(4, dtype=torch.uint8, device=mask.device)
    last = (g * position).amax(-1)
    first = (g * position).sum(-1, dtype=torch.uint8) - last
    nibble = first | (last << 2)
    if nibble.shape[-1] % 2:
        nibble = torch.nn.functional.pad(nibble, (0, 1))
    return nibble[..., 0::2] | (nibble[..., 1::2] << 4)


def codes_to_mask(codes: Tensor, in_features: int) -> Tensor:
    """The mask [..., in_features] behind codes [..., ceil(in_features/8)]; see `mask_to_codes`."""
    nibble = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., : in_features // 4, None]
    position = torch.arange(4, dtype=torch.uint8, device=codes.device)
    return ((nibble & 3) == position).logical_or((nibble >> 2) == position).flatten(-2)


def tile_codes(codes: Tensor) -> Tensor:
    """The codes of `pack_2to4` in the order in which Hopper's sparse tensor cores read them.

    cuSPARSELt keeps them so behind the values, which it leaves as they are; the CUDA kernel for few
    tokens reads the same tiles. A tile holds 64 rows and 32 columns: for each 16 of the rows, each
    r < 8 and each g < 4, byte 2g + i has group g + 4i of row r in its low half and of row r + 8 in
    its high one.

    Args:
        codes: uint8 [N, K/8], K a multiple of 32.

    Returns:
        uint8 [ceil(N/64), K/32, 256]; rows past the last keep their first two.
    """
    n, width = codes.shape
    tiles, columns = -(-n // 64), width // 4
    nibbles = torch.stack((codes & 15, codes >> 4), -1).reshape(n, 2 * width)
    nibbles = torch.nn.functional.pad(nibbles, (0, 0, 0, 64 * tiles - n), value=0b0100)
    nibbles = nibbles.reshape(tiles, 4, 2, 8, columns, 2, 4).permute(0, 4, 1, 3, 6, 5, 2)
    return (nibbles[..., 0] | nibbles[..., 1] << 4).reshape(tiles, columns, 256)


def untile_codes(tiles: Tensor, n: int) -> Tensor:
    """The codes [N, K/8] behind `tile_codes`' [ceil(N/64), K/32, 256]."""
    count, columns, _ = tiles.shape
    nibbles = torch.stack((tiles & 15, tiles >> 4), -1).reshape(count, columns, 4, 8, 4, 2, 2)
    nibbles = nibbles.permute(0, 2, 6, 3, 1, 5, 4).reshape(64 * count, 4 * columns, 2)[:n]
    return nibbles[..., 0] | nibbles[..., 1] << 4


def tile_codes_8_bit(codes: Tensor) -> Tensor:
    """The codes of a weight of 8-bit values as Hopper's sparse tensor cores read them.

    They are not those of `tile_codes`: with 8 bits every thread of a warpgroup gives the places of
    one row. A tile holds 64 rows and 64 columns. Of thread t, with q = t % 4, bytes 4t to 4t + 3
    hold row 16*(t // 32) + t % 32 // 4 + 8*(q % 2), columns 32*(q // 2) to 32*(q // 2) + 31, in the
    order of `pack_2to4`.

    Args:
        codes: uint8 [N, K/8], K a multiple of 64.

    Returns:
        uint8 [ceil(N/64), K/64, 512]; rows past the last keep their first two.

    Source: PTX ISA, matrix fragments of wgmma.mma_async.sp for .e4m3, sparsity selector 0.
    """
    n, width = codes.shape
    tiles, columns = -(-n // 64), width // 8
    codes = torch.nn.functional.pad(codes, (0, 0, 0, 64 * tiles - n), value=0x44)
    # [tile, warp, upper or lower 8 rows, row, tile column, half, byte]
    codes = codes.reshape(tiles, 4, 2, 8, columns, 2, 4).permute(0, 4, 1, 3, 5, 2, 6)
    return codes.reshape(tiles, columns, 512)


def untile_codes_8_bit(tiles: Tensor, n: int) -> Tensor:
    """The codes [N, K/8] behind `tile_codes_8_bit`'s [ceil(N/64), K/64, 512]."""
    count, columns, _ = tiles.shape
    codes = tiles.reshape(count, columns, 4, 8, 2, 2, 4).permute(0, 2, 5, 3, 1, 4, 6)
    return codes.reshape(64 * count, 8 * columns)[:n]


def pack_2to4(w: Tensor) -> tuple[Tensor, Tensor]:
    """The two kept values of each group, and where they stood.

    Args:
        w: [..., K], floating, already 2:4 (`ops.pack_2to4` checks it; this definition does not).

    Returns:
        values: [..., K/2] of w's dtype, in order of position.
        codes: uint8 [..., ceil(K/8)]; see `mask_to_codes`. A group with fewer than two non-zeros
            keeps zeros at the lowest free positions.
    """
    mask = mask_2to4(w)
    values = _movable(w).reshape(-1)[mask.reshape(-1)].reshape(*w.shape[:-1], w.shape[-1] // 2)
    return values.view(w.dtype), mask_to_codes(mask)


def unpack_2to4(values: Tensor, codes: Tensor) -> Tensor:
    """The dense [..., K] behind `pack_2to4`'s values [..., K/2] and codes [..., ceil(K/8)].

    The codes of a weight [N, K] may be in tiles, see `tile_codes`, and for 8-bit values
    `tile_codes_8_bit`.
    """
    if codes.dim() == 3 and values.dim() == 2:
        untile = untile_codes_8_bit if values.element_size() == 1 else untile_codes
        codes = untile(codes, values.shape[0])
    mask, bits = codes_to_mask(codes, 2 * values.shape[-1]), _movable(values)
    dense = torch.zeros_like(mask, dtype=bits.dtype).masked_scatter_(mask, bits)
    return dense.view(values.dtype)


def sparse_linear(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    bias: Tensor | None = None,
    compressed: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """The linear layer of a packed 2:4 weight: x @ W^T + bias.

    Args:
        x: [..., K] input of the values' dtype.
        values: [N, K/2], from `pack_2to4`.
        codes: uint8 [N, ceil(K/8)], from `pack_2to4`, or in tiles from `tile_codes`.
        bias: [N], or None.
        compressed: the same weight as a library compresses it; not read here.
        dense: the same weight [N, K] unpacked, if it is at hand.

    Returns:
        [..., N] of x's dtype.

    Cost: for few tokens memory-bound in the weight, 9/16 of its dense bytes when fused; for many
    compute-bound, at half the dense operations on sparse tensor cores.
    """
    w = unpack_2to4(values, codes) if dense is None else dense
    return torch.nn.functional.linear(x, w, bias)


def sparse_linear_decode(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`sparse_linear` for few tokens, as in decoding, from the packed form alone.

    Args:
        x: [..., K] with at most 64 tokens, of the values' dtype.
        values: [N, K/2], from `pack_2to4`.
        codes: uint8 [N, ceil(K/8)], from `pack_2to4`, or in tiles from `tile_codes`.
        bias: [N], or None.

    Returns:
        [..., N] of x's dtype.

    Cost: memory-bound; a fused kernel reads 9/16 of the dense weight's bytes.
    """
    return sparse_linear(x, values, codes, bias)


def sparse_linear_group(
    x: Tensor,
    values: Sequence[Tensor],
    codes: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    compressed: Sequence[Tensor | None],
    dense: Sequence[Tensor | None],
) -> list[Tensor]:
    """`sparse_linear` of one x and several weights, such as those of queries, keys and values.

    Args:
        x: [..., K] input of the values' dtype.
        values: of each weight [N_i, K/2], as of all below.
        codes: uint8 [N_i, ceil(K/8)], or in tiles.
        bias: [N_i], or None.
        compressed: the same weight as a library compresses it, or None; not read here.
        dense: the same weight [N_i, K] unpacked, or None.

    Returns:
        For each weight [..., N_i] of x's dtype.

    Cost: that of the products, of which those for few tokens can share a launch.
    """
    forms = zip(values, codes, bias, compressed, dense, strict=True)
    return [sparse_linear(x, *weight) for weight in forms]


def quantize_fp8(w: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each row as e4m3 values and one scale: w is about values * scale.

        scale = max(max|row| / 448, 2^-126), or 1 for a row of zeros
        values = e4m3(clamp(row / scale, -448, 448))

    Both divisions are rounded in float32, the values to nearest even. What rounds to zero is +0.
    With scales given, a value depends on its own entry alone: pruning and rounding then commute bit
    for bit.

    Args:
        w: [..., K], floating; float64 is rounded to float32 first.
        scale: float32 [...] of positive numbers, or None.

    Returns:
        values: float8_e4m3fn [..., K]; a row with NaN or infinity holds NaN.
        scale: float32 [...].

    Cost: memory-bound when fused; reads w once, writes one byte an entry.

    Source: scheme FP8_DYNAMIC of compressed-tensors (weights by row, activations by token).
    """
    x = w.float()
    if scale is None:
        largest = x.abs().amax(-1) if w.shape[-1] else x.new_zeros(w.shape[:-1])
        # By a tensor: a GPU would multiply by the reciprocal of a number, which rounds otherwise.
        scale = (largest / torch.full_like(largest, FP8_MAX)).clamp_min(_SMALLEST_SCALE)
        scale = torch.where(largest == 0, 1.0, scale)
    rounded = (x / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    # In bits: arithmetic on 8-bit floats is not defined everywhere.
    bits = rounded.view(torch.uint8)
    return torch.where(bits == 0x80, 0, bits).view(FP8), scale


def dequantize_fp8(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows [..., K] that `quantize_fp8`'s results stand for, rounded to `dtype`."""
    return (values.float() * scale.unsqueeze(-1)).to(dtype)


def sparse_linear_fp8(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """The linear layer of a packed 2:4 weight in FP8, with activations rounded token by token.

        xq, xs = quantize_fp8(x)
        y = (xq @ Wq^T) * xs * weight_scale + bias

    All in float32: products of two e4m3 numbers are exact there, sums are not.

    Args:
        x: [..., K] input, bfloat16, float16 or float32.
        values: float8_e4m3fn [N, K/2], from `pack_2to4` of `quantize_fp8`'s values.
        codes: uint8 [N, ceil(K/8)], from `pack_2to4`, or in tiles from `tile_codes_8_bit`.
        weight_scale: float32 [N].
        bias: [N] of x's dtype, or None.
        dense: float8_e4m3fn [N, K], the values unpacked, if they are at hand.

    Returns:
        [..., N] of x's dtype, rounded once. A token with NaN or infinity gives NaN.

    Cost: for few tokens memory-bound in the weight, 5/16 of the bytes of a dense one in 16 bits;
    for many compute-bound.

    Source: scheme FP8_DYNAMIC of compressed-tensors.
    """
    w = unpack_2to4(values, codes) if dense is None else dense
    x_values, x_scale = quantize_fp8(x)
    y = torch.nn.functional.linear(x_values.float(), w.float())
    y = y * x_scale.unsqueeze(-1) * weight_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def frozen_regularizer_grad(p: Tensor, w0: Tensor, reg_eps: float) -> Tensor:
    """Gradient of F(W; W0) = || W / (W0 + eps*sign(W0)) * (W - W0) ||^2 with sign(0) = 1.

    Pulls every weight towards either 0 or its original value.

    Source: arXiv:2502.00258, equation 5.
    """
    r = 1 / torch.where(w0 < 0, w0 - reg_eps, w0 + reg_eps)
    return 2 * (r * p * (p - w0)) * r * (2 * p - w0)


def _adam(
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """New moments and the bias-corrected direction, all in grad's dtype."""
    m = beta1 * m.to(grad.dtype) + (1 - beta1) * grad
    v = beta2 * v.to(grad.dtype) + (1 - beta2) * grad * grad
    direction = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    return m, v, direction


def prox_adamw_(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: float | Tensor,
    lr: float | Tensor,
    lam: float | Tensor,
    grad_scale: float | Tensor = 1.0,
    w0: Tensor | None = None,
    lam2: float = 0.0,
    reg_eps: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """One AdamW step on the weights, then their proximal step, in place.

        g <- grad_scale*grad + lam2 * dF(p; w0)
        m, v <- Adam moments of g
        p <- prox_{lam R}( p*(1 - lr*weight_decay) - lr * mhat / (sqrt(vhat) + eps) )

    Args:
        p: [..., K] parameter, updated; float64, float32, bfloat16 or float16.
        grad: like p, its gradient.
        m: like p, first moment, updated; any floating dtype (kept as it is).
        v: like p, second moment, updated.
        step: number of this step, from 1; float or 0-d tensor, as all scalars below.
        lr: learning rate (absolute, decoupled weight decay is lr*weight_decay).
        lam: proximal strength of this step, applied as it is.
        grad_scale: factor on grad, e.g. from clipping.
        w0: like p, the original weight; needed when lam2 is not 0.
        lam2: strength of the frozen-weight regulariser.
        reg_eps: its eps (1e-3 ... 1e-1 in units of the weight).
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: AdamW's eps.
        weight_decay: decoupled.

    Cost: memory-bound when fused; reads p, grad, m, v (and w0), writes p, m, v.

    Source: arXiv:2502.00258, algorithm 1.
    """
    dtype = compute_dtype(p.dtype)
    step, lr = (torch.as_tensor(x, dtype=dtype, device=p.device) for x in (step, lr))
    w = p.to(dtype)
    g = grad.to(dtype) * grad_scale
    if lam2 != 0:
        if w0 is None:
            raise ValueError("lam2 is not 0, so the original weight w0 is needed")
        g = g + lam2 * frozen_regularizer_grad(w, w0.to(dtype), reg_eps)
    new_m, new_v, direction = _adam(g, m, v, step, beta1, beta2, eps)
    w = w * (1 - lr * weight_decay) - lr * direction
    m.copy_(new_m)
    v.copy_(new_v)
    p.copy_(prox_2to4(w, lam))


def gate_prior(w0: Tensor, act_norm: Tensor) -> Tensor:
    """Wanda's importance to the power 1.5, scaled to RMS 1 in each group of four and floored.

    With the power 1 the mask follows the noise of the first gradients too far from Wanda's, see
    benchmarks/results/NOTES.md.

    Args:
        w0: [..., N, K] frozen weight.
        act_norm: [..., K] norm of each input feature over the calibration tokens; any unit, since
            the scale of a group cancels.

    Returns:
        A = max(b / rms_group(b), 1e-3) with b = a^1.5 and a = |w0| * act_norm, relative to its RMS
        in the group; [..., N, K] in the compute dtype.
    """
    dtype = compute_dtype(w0.dtype)
    a = _groups(w0.to(dtype).abs() * act_norm.to(dtype).unsqueeze(-2))
    a = _relative(a)
    return _relative(a * a.sqrt()).clamp_min(PRIOR_FLOOR).reshape(w0.shape)


def _relative(groups: Tensor) -> Tensor:
    """Groups [..., 4] over their RMS; zeros stay."""
    rms = groups.square().mean(-1, keepdim=True).sqrt()
    return torch.where(rms > 0, groups / rms, 0.0)


def gate_score(w0: Tensor, s: Tensor, act_norm: Tensor) -> Tensor:
    """A*s, the score whose top two of each group are kept; [..., N, K]. s may be of 8 bits."""
    prior = gate_prior(w0, act_norm)
    gate = s.to(prior.dtype)
    return prior * (gate / 255 if s.dtype == torch.uint8 else gate)


def gate_project_(s: Tensor, w0: Tensor, act_norm: Tensor, out: Tensor) -> None:
    """Write the weight under the mask that the gates stand for.

        out <- w0 where A*s is among the two largest of its group, else +0.0

    Args:
        s: [..., N, K] gates in [0, 1]; floating, or uint8: multiples of 1/255.
        w0: [..., N, K] frozen weight.
        act_norm: [..., K] norms behind the prior A, see `gate_prior`.
        out: like w0, written: what the next forward pass computes with. The same as the hard `out`
            of `gate_update_`, so that a weight need not be kept between steps.

    Cost: memory-bound when fused; reads s and w0, writes out.
    """
    out.copy_(project_2to4(w0, gate_score(w0, s, act_norm)))


def gate_update_(
    s: Tensor,
    grad: Tensor,
    w0: Tensor,
    m: Tensor,
    v: Tensor,
    act_norm: Tensor,
    step: float | Tensor,
    lr: float | Tensor,
    lam: float | Tensor,
    grad_scale: float | Tensor = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    out: Tensor | None = None,
    hard: bool = False,
    scales: Tensor | None = None,
    seed: int = 0,
) -> None:
    """One Adam step on the gates, then their proximal step in the metric of the prior, in place.

        ds <- grad_scale * grad * w0
        s <- s - lr * mhat / (sqrt(vhat) + eps)
        s <- clip( prox_{lam R}(A * clip(s, 0, 1)) / A, 0, 1 )
        out <- w0 * s, or if hard w0 where A*s is among the two largest of its group, else +0.0

    States of 8 bits are read as floats, take the same step, and are rounded stochastically: up or
    down with the probabilities that make the result the expected value. Exact and the same on every
    backend are the step, the scales, and that a code is one of the two around its value; the random
    numbers are each backend's own, so codes agree in distribution only. One exception: a code of v
    is at least 1 where v is not 0, because the next step divides by its root.

    Args:
        s: [..., N, K] gates in [0, 1], updated; float64, float32 or bfloat16. Or, with scales,
            uint8: multiples of 1/255.
        grad: [..., N, K] gradient of the loss with respect to the gated weight w0*s.
        w0: [..., N, K] frozen weight.
        m: like s, first moment, updated. With scales int8.
        v: like s, second moment, updated. With scales uint8: codes of its square root.
        act_norm: [..., K] norms behind the prior, see `gate_prior`.
        step: number of this step, from 1; float or 0-d tensor, as lr, lam and grad_scale.
        lr: learning rate of the gates.
        lam: proximal strength of this step, in the units of a group of RMS 1.
        grad_scale: factor on grad.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: Adam's eps.
        out: like w0; receives the weight for the next forward pass when given.
        hard: what out receives: False the gated weight, True the weight under the mask that the
            gates stand for now, so that the forward pass sees what will be kept and the gradient,
            taken as if it were w0*s, decides what should be (straight-through).
        scales: float32 [..., ceil(N*K/256), 2], zeros at first, updated: what a unit of m's and of
            v's codes stands for in each 256 consecutive elements of a matrix. None: float states.
        seed: with the step, decides the rounding of 8-bit states.

    Cost: memory-bound when fused; reads grad, w0, s, m, v, writes s, m, v (and out).
    """
    if scales is not None:
        floats = s.float() / 255, _dequantize(m, scales[..., 0]), _dequantize(v, scales[..., 1])
        gate, first, second = floats[0], floats[1], floats[2].square()
        adam = (beta1, beta2, eps)
        gate_update_(gate, grad, w0, first, second, act_norm, step, lr, lam, grad_scale, *adam)
        random = torch.Generator(s.device).manual_seed(seed * 1_000_003 + int(step))
        _quantize_(m, first, scales[..., 0], 127, random)
        _quantize_(v, second.sqrt(), scales[..., 1], 255, random)
        v.clamp_(min=(second > 0).to(v.dtype))
        s.copy_((gate * 255 + _uniform_like(gate, random)).floor())
        if out is not None and hard:
            gate_project_(s, w0, act_norm, out)
        elif out is not None:
            out.copy_(w0.float() * (s.float() / 255))
        return
    dtype = compute_dtype(s.dtype)
    step, lr = (torch.as_tensor(x, dtype=dtype, device=s.device) for x in (step, lr))
    frozen = w0.to(dtype)
    ds = grad.to(dtype) * frozen * grad_scale
    new_m, new_v, direction = _adam(ds, m, v, step, beta1, beta2, eps)
    prior = gate_prior(frozen, act_norm)
    gate = (s.to(dtype) - lr * direction).clamp(0, 1)
    gate = (prox_2to4(prior * gate, lam) / prior).clamp(0, 1)
    m.copy_(new_m)
    v.copy_(new_v)
    s.copy_(gate)
    if out is not None:
        s = s.to(dtype)
        out.copy_(project_2to4(frozen, prior * s) if hard else frozen * s)


def _dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes [..., N, K] times the scale [..., ceil(N*K/256)] of their block; float32."""
    size = codes.shape[-2] * codes.shape[-1]
    each = scale.repeat_interleave(QUANTUM_BLOCK, -1)[..., :size]
    return codes.float() * each.reshape(codes.shape)


def _quantize_(codes: Tensor, x: Tensor, scale: Tensor, top: int, random: torch.Generator) -> None:
    """The inverse of `_dequantize`, in place, with the largest magnitude of a block at `top`."""
    blocks = x.flatten(-2)
    blocks = torch.nn.functional.pad(blocks, (0, -blocks.shape[-1] % QUANTUM_BLOCK))
    scale.copy_(blocks.reshape(*scale.shape, QUANTUM_BLOCK).abs().amax(-1) / top)
    unit = _dequantize(torch.ones_like(codes), scale)
    whole = (torch.where(unit > 0, x / unit, 0.0) + _uniform_like(x, random)).floor()
    codes.copy_(whole.clamp(-top, top))


def _uniform_like(x: Tensor, random: torch.Generator) -> Tensor:
    """Numbers in [0, 1)."""
    return torch.rand(x.shape, generator=random, dtype=x.dtype, device=x.device)


def _groups(x: Tensor) -> Tensor:
    """[..., K] in the compute dtype as [..., K/4, 4]."""
    return x.to(compute_dtype(x.dtype)).reshape(*x.shape[:-1], x.shape[-1] // 4, 4)
