// The exact proximal operator of R for kLanes groups side by side, in float32.
//
// The problem is reference.py's `_prox_sorted` (what is proven and what is tested is said there),
// in units where lam = 1: with u = lam*z it is 1/2 ||x - u||^2 + R(x), and w = x/lam. What makes it
// fast is that only winners are looked for:
//
// * On the box 0 <= x <= u the row sums of R's Hessian are at most twice the sum of u. Where this
//   is below 1 the problem is convex and coordinate steps find its minimum, in whatever order.
// * A stationary 3-sparse x beats the 2-sparse (u1, u2, 0, 0) exactly when x1^2 + x2^2 < 1, hence
//   x3 < 0.71; a dense minimum needs x1 + x2 < 1. Either way u1 < 1.25.
// * Where u1^2 + u2^2 < 1, the 3-sparse candidate wins over the 2-sparse exactly when u3 > u1*u2;
//   and where u4 > u1*u2 + u1*u3 + u2*u3 the dense one wins over both.
// * The dense candidate wins when the fourth entry would grow from 0 at the best sparser candidate.
//   Otherwise it wins only by a jump, met only among u1 + u2 > 1 with a pull of the fourth entry
//   above -0.0681, its least where all four are 0.875 (searched; kJumpPull leaves room), and only
//   there are objectives compared.
//
#pragma once

#include <cmath>

#include "tensor_view.h"

namespace proxsparse {

constexpr int kChunk = 16;  // lanes of the dense candidate solved in one go
constexpr int kThreeSteps = 9, kDenseSteps = 3;
constexpr float kConverged = 1e-2f;    // relative Newton step; Halley's error is its cube
constexpr float kArrived = 1e-2f;      // relative Newton step, the last allowed
constexpr float kLargestU1 = 1.2501f;  // above it the 2-sparse candidate wins
constexpr float kLargestX3 = 0.708f;   // of a 3-sparse winner
constexpr float kJumpPull = -0.08f;    // least pull at which the dense candidate wins by a jump
constexpr float kHuge = 1e18f;         // squares beyond it overflow

using Lanes = float[kLanes];
using Flags = std::int32_t[kLanes];
constexpr std::int32_t kGrows = 1, kJumps = 2;  // how the dense candidate may win

// The maximum of integers is one instruction, that of floats two. NaN becomes 0 or stays NaN.
PROXSPARSE_INLINE float positive(float x) {
  const std::int32_t bits = static_cast<std::int32_t>(float_to_bits(x));
  return bits_to_float(static_cast<std::uint32_t>(bits > 0 ? bits : 0));
}

class Prox {
 public:
  // A lam too small to change a float32 is taken as 0.
  explicit Prox(float lam) : lam_(lam > 1e-30f ? lam : 0.0f), inverse_lam_(0.0f) {
    if (lam_ > 0.0f) inverse_lam_ = 1.0f / lam_;
  }

  // A tile of z, in place: groups of four neighbours become their prox.
  PROXSPARSE_INLINE void apply(float* tile) const {
    alignas(64) Lanes z[4];
    PROXSPARSE_SIMD
    for (int i = 0; i < kLanes; ++i) {
      z[0][i] = std::fabs(tile[4 * i]), z[1][i] = std::fabs(tile[4 * i + 1]);
      z[2][i] = std::fabs(tile[4 * i + 2]), z[3][i] = std::fabs(tile[4 * i + 3]);
    }
    solve(z);
    PROXSPARSE_SIMD
    for (int i = 0; i < kLanes; ++i) {
      tile[4 * i] = signed_like(z[0][i], tile[4 * i]);
      tile[4 * i + 1] = signed_like(z[1][i], tile[4 * i + 1]);
      tile[4 * i + 2] = signed_like(z[2][i], tile[4 * i + 2]);
      tile[4 * i + 3] = signed_like(z[3][i], tile[4 * i + 3]);
    }
  }

  // Magnitudes, entry by entry, in place.
  PROXSPARSE_INLINE void solve(Lanes (&z)[4]) const {
    float largest = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < kLanes; ++i) {
      const float sum = z[0][i] + z[1][i] + z[2][i] + z[3][i];
      const float comparable = sum < kHuge ? sum : kHuge;  // NaN becomes huge too
      largest = comparable > largest ? comparable : largest;
    }
    const float curvature = 2.0f * lam_ * largest;
    if (curvature < 1.0f && largest < kHuge) {
      solve_convex(z, 4 + static_cast<int>(5.0f * curvature));
    } else {
      solve_sorted(z);
    }
  }

 private:
  // Coordinate descent from z itself, in place and in z's own units.
  PROXSPARSE_INLINE void solve_convex(Lanes (&z)[4], int sweeps) const {
    alignas(64) Lanes x[4];
    copy(z, x);
    for (int sweep = 0; sweep < sweeps; ++sweep) {
      PROXSPARSE_SIMD
      for (int i = 0; i < kLanes; ++i) {
        float x1 = x[0][i], x2 = x[1][i], x3 = x[2][i], x4 = x[3][i];
        x4 = positive(z[3][i] - lam_ * (x1 * x2 + x3 * (x1 + x2)));
        x3 = positive(z[2][i] - lam_ * (x1 * x2 + x4 * (x1 + x2)));
        x2 = positive(z[1][i] - lam_ * (x3 * x4 + x1 * (x3 + x4)));
        x1 = positive(z[0][i] - lam_ * (x3 * x4 + x2 * (x3 + x4)));
        x[0][i] = x1, x[1][i] = x2, x[2][i] = x3, x[3][i] = x4;
      }
    }
    copy(x, z);
  }

  static PROXSPARSE_INLINE void copy(const Lanes (&from)[4], Lanes (&to)[4]) {
    for (int entry = 0; entry < 4; ++entry) {
      PROXSPARSE_SIMD
      for (int i = 0; i < kLanes; ++i) to[entry][i] = from[entry][i];
    }
  }

  // The general case: sort, find the winner, put back; in place.
  PROXSPARSE_INLINE void solve_sorted(Lanes (&z)[4]) const {
    alignas(64) Lanes u[4], x[3];
    alignas(64) Flags order, needs3, dense;
    std::int32_t any3 = 0;

    // Adjacent exchanges only, which is stable: of equal magnitudes the lower index stays first.
#pragma omp simd reduction(| : any3)
    for (int i = 0; i < kLanes; ++i) {
      std::int32_t m1 = to_int(z[0][i]), m2 = to_int(z[1][i]);
      std::int32_t m3 = to_int(z[2][i]), m4 = to_int(z[3][i]);
      std::int32_t swaps = exchange(m1, m2, 1) | exchange(m2, m3, 2) | exchange(m3, m4, 4);
      swaps |= exchange(m1, m2, 8) | exchange(m2, m3, 16);
      order[i] = swaps | exchange(m1, m2, 32);
      const float z1 = bits_to_float(m1), z2 = bits_to_float(m2);
      const float z3 = bits_to_float(m3), z4 = bits_to_float(m4);
      z[0][i] = z1, z[1][i] = z2, z[2][i] = z3, z[3][i] = z4;

      const float a = lam_ * z1, b = lam_ * z2, c = lam_ * z3, d = lam_ * z4;
      // Joined by & and |, as GCC would make paths of their own of && and of a chain of ?:.
      const bool candidate = a < kLargestU1;
      const bool unless2 = (a * b < c) | (a * a + b * b >= 1.0f);
      const bool unless4 = d <= a * b + c * (a + b);
      const bool needed = candidate & unless2 & unless4;
      const float start = start_three(a, b, c);
      // Where the 2-sparse candidate wins for its size, u is 0 and nothing below is cut.
      u[0][i] = candidate ? a : 0.0f, u[1][i] = candidate ? b : 0.0f;
      u[2][i] = candidate ? c : 0.0f, u[3][i] = candidate ? d : 0.0f;
      needs3[i] = needed;
      x[2][i] = needed ? start : 0.0f;
      any3 |= needed;
    }

    // The best sparser candidate, and the pull on a fourth entry there.
    if (any3) solve_three(u, needs3, x[2]);
    PROXSPARSE_SIMD
    for (int i = 0; i < kLanes; ++i) {
      const float a = u[0][i], b = u[1][i], c = x[2][i];
      const float inverse = 1.0f / (1.0f - c * c);
      const float x1 = (a - c * b) * inverse, x2 = (b - c * a) * inverse;
      const bool wins = (c > 0.0f) & (x1 * x1 + x2 * x2 < 1.0f);
      const float first = wins ? x1 : a, second = wins ? x2 : b, third = wins ? c : 0.0f;
      x[0][i] = first, x[1][i] = second, x[2][i] = third;
      const float pull = u[3][i] - (first * second + third * (first + second));
      const bool grows = (pull >= 0.0f) & is_candidate(z[0][i]);
      const bool jumps = (pull > kJumpPull) & (a + b > 1.0f);
      dense[i] = grows ? kGrows : jumps ? kJumps : 0;
    }
    // Few lanes need the dense candidate, and it costs the most: they are solved side by side.
    Few few;
    for (int word = 0; word < kLanes; word += 32) {
      std::uint32_t bits = 0;
#pragma omp simd reduction(| : bits)
      for (int i = 0; i < 32; ++i) bits |= dense[word + i] ? 1u << i : 0u;
      for (; bits != 0; bits &= bits - 1) few.add(word + __builtin_ctz(bits), u);
    }
    few.solve(u, x, dense);
    finish(order, u, x, dense, z);
  }

  PROXSPARSE_INLINE bool is_candidate(float z1) const { return lam_ * z1 < kLargestU1; }

  // As integers, magnitudes order as they do as floats, NaN above all.
  static PROXSPARSE_INLINE std::int32_t to_int(float magnitude) {
    return static_cast<std::int32_t>(float_to_bits(magnitude));
  }

  static PROXSPARSE_INLINE std::int32_t exchange(std::int32_t& a, std::int32_t& b,
                                                 std::int32_t bit) {
    const std::int32_t swap = b > a ? bit : 0;
    const std::int32_t larger = a > b ? a : b, smaller = a > b ? b : a;
    a = larger, b = smaller;
    return swap;
  }

  static PROXSPARSE_INLINE void restore(float& a, float& b, std::int32_t order, std::int32_t bit) {
    const bool swap = (order & bit) != 0;
    const float first = swap ? b : a, second = swap ? a : b;
    a = first, b = second;
  }

  // Halley's method on the third entry t: t - u3 + x1*x2 = 0 with x1 = (u1 - t*u2)/(1 - t^2), x2
  // alike, brought over one denominator. The left side is convex below a ceiling, and from there,
  // from u3 and from the Newton step at t = 0 the root lies to the left: the start is their least.
  static PROXSPARSE_INLINE float start_three(float u1, float u2, float u3) {
    const float sum = u1 + std::sqrt((u1 - u2) * (u1 + u2));
    const float slope = 1.0f - (u1 * u1 + u2 * u2), value = u3 - u1 * u2;
    const bool nearer = value * sum < u2 * slope;  // Newton's step than the ceiling, u2 / sum
    const float above = nearer ? value : u2, below = nearer ? slope : sum;
    const float start = above / below;
    const float most = start < kLargestX3 ? start : kLargestX3;
    return u3 > most ? most : u3;
  }

  static PROXSPARSE_INLINE void solve_three(const Lanes (&u)[4], Flags& active, Lanes& t) {
    for (int step = 0; step < kThreeSteps; ++step) {
      std::int32_t any = 0;
#pragma omp simd reduction(| : any)
      for (int i = 0; i < kLanes; ++i) {
        const float now = t[i];
        const float n1 = u[0][i] - now * u[1][i], n2 = u[1][i] - now * u[0][i];
        const float det = 1.0f - now * now, det2 = det * det;
        const float product = n1 * n2, squares = n1 * n1 + n2 * n2;
        const float value = (now - u[2][i]) * det2 + product;
        const float slope = det * det2 - (squares - 2.0f * now * product);
        const float bend = (2.0f - det) * product - now * squares;
        const float over = slope * slope - 3.0f * value * bend;
        const float found = positive(now - det * value * slope / over);
        const float next = (slope < over ? slope : over) > 0.0f ? found : 0.0f;
        t[i] = active[i] ? next : now;
        // By Newton's step: Halley's is small near a minimum that is no root, too.
        const float newton = std::fabs(det * value);  // times the slope
        const std::int32_t moves = newton > kConverged * next * slope ? active[i] : 0;
        active[i] = next > 0.0f ? moves : 0;
        any |= active[i];
      }
      if (!any) return;
    }
    for (int i = 0; i < kLanes; ++i) t[i] = active[i] ? 0.0f : t[i];
  }

  // The dense candidate of a few lanes: where it wins, it replaces x, and elsewhere the `dense`
  // flag is taken back. Newton on the pair sums s = x1 + x2 and q = x3 + x4. The start keeps
  // s + 0.18*(u3 + u4) below 1; from there every winner is reached in kDenseSteps without leaving
  // the set where the Hessian is positive (tested). Lanes that leave it, or whose last step is not
  // small, do not win; lanes that can only win by a jump do where their objective is lower.
  struct Few {
    int count = 0;
    int lanes[kLanes];
    alignas(64) Lanes v[4], margin;  // u, then x

    PROXSPARSE_INLINE void add(int lane, const Lanes (&u)[4]) {
      for (int entry = 0; entry < 4; ++entry) v[entry][count] = u[entry][lane];
      lanes[count++] = lane;
    }

    PROXSPARSE_INLINE void solve(const Lanes (&u)[4], Lanes (&x)[3], Flags& dense) {
      for (int i = count; i % kChunk != 0; ++i) v[0][i] = v[1][i] = v[2][i] = v[3][i] = 0.0f;
      for (int begin = 0; begin < count; begin += kChunk) solve_chunk(begin);
      for (int i = 0; i < count; ++i) {
        const int lane = lanes[i];
        const float x1 = v[0][i], x2 = v[1][i], x3 = v[2][i], x4 = v[3][i];
        bool wins = margin[i] > 0.0f;
        if (wins && dense[lane] == kJumps) {
          const float u1 = u[0][lane], u2 = u[1][lane], u3 = u[2][lane], u4 = u[3][lane];
          wins = x4 > 0.0f && gain(x1, x2, x3, x4, u1, u2, u3, u4) <
                                  gain(x[0][lane], x[1][lane], x[2][lane], 0.0f, u1, u2, u3, u4);
        }
        if (wins) {
          x[0][lane] = x1, x[1][lane] = x2, x[2][lane] = x3;
        } else {
          dense[lane] = 0;
        }
      }
    }

    PROXSPARSE_INLINE void solve_chunk(int begin) {
      PROXSPARSE_SIMD
      for (int i = begin; i < begin + kChunk; ++i) {
        const float u1 = v[0][i], u2 = v[1][i], u3 = v[2][i], u4 = v[3][i];
        const float a = u1 + u2, b = u1 - u2, c = u3 + u4, e = u3 - u4;
        const float bound = 1.0f - 0.18f * c;
        const float first = a < bound ? a : bound;
        float q = positive((c - 0.5f * (first * first - b * b)) / (1.0f + first));
        const float second = (a - 0.5f * q * q) / (1.0f + q);
        float s = second < bound ? second : bound;
        float inside = 1.0f, change = 0.0f;
#pragma GCC unroll 3
        for (int step = 0; step < kDenseSteps; ++step) {
          const float one_s = 1.0f - s, one_q = 1.0f - q;
          const float inverse = 1.0f / (one_s * one_q);
          const float over_s = inverse * one_q, over_q = inverse * one_s;
          const float gap12 = b * over_q, gap34 = e * over_s;
          const float f_s = s - a + q * s + 0.5f * (q * q - gap34 * gap34);
          const float f_q = q - c + q * s + 0.5f * (s * s - gap12 * gap12);
          const float h_s = 1.0f + q - gap34 * gap34 * over_s;
          const float h_q = 1.0f + s - gap12 * gap12 * over_q;
          const float cross = s + q;
          const float det = h_s * h_q - cross * cross;
          const float over_det = 1.0f / det;
          const float step_s = (h_q * f_s - cross * f_q) * over_det;
          const float step_q = (h_s * f_q - cross * f_s) * over_det;
          s -= step_s, q -= step_q;
          const float least = one_s < h_s ? one_s : h_s;
          inside = least < det ? least : det;
          change = std::fabs(step_s) + std::fabs(step_q);
        }
        const float inverse = 1.0f / ((1.0f - s) * (1.0f - q));
        const float gap12 = b * inverse * (1.0f - s), gap34 = e * inverse * (1.0f - q);
        // Rounding must not leave a negative entry: its product would be added to the others.
        v[0][i] = positive(0.5f * (s + gap12)), v[1][i] = positive(0.5f * (s - gap12));
        v[2][i] = positive(0.5f * (q + gap34)), v[3][i] = positive(0.5f * (q - gap34));
        margin[i] = change <= kArrived * s ? inside : 0.0f;
      }
    }
  };

  // Objective of x less that of (u1, u2, 0, 0).
  static PROXSPARSE_INLINE float gain(float x1, float x2, float x3, float x4, float u1, float u2,
                                      float u3, float u4) {
    const float cut1 = u1 - x1, cut2 = u2 - x2;
    return 0.5f * (cut1 * cut1 + cut2 * cut2) + x3 * (0.5f * x3 - u3) + x4 * (0.5f * x4 - u4) +
           x1 * x2 * (x3 + x4) + x3 * x4 * (x1 + x2);
  }

  // One sweep of exact coordinate steps, smallest entry first; then the order of before. The cuts
  // are what the steps take off u, so entries that are not cut stay bitwise those of z.
  PROXSPARSE_INLINE void finish(const Flags& order, const Lanes (&u)[4], const Lanes (&x)[3],
                                const Flags& dense, Lanes (&z)[4]) const {
    PROXSPARSE_SIMD
    for (int i = 0; i < kLanes; ++i) {
      // Rounding may leave these below 0, and a negative cut would bring zeros to life.
      float x1 = x[0][i], x2 = positive(x[1][i]), x3 = positive(x[2][i]);
      const float cut4 = x1 * x2 + x3 * (x1 + x2);
      const float x4 = dense[i] ? positive(u[3][i] - cut4) : 0.0f;
      const float cut3 = x1 * x2 + x4 * (x1 + x2);
      const float keeps3 = dense[i] ? 1.0f : x3;
      x3 = keeps3 > 0.0f ? positive(u[2][i] - cut3) : 0.0f;
      const float cut2 = x1 * x3 + x4 * (x1 + x3);
      x2 = positive(u[1][i] - cut2);
      const float cut1 = x2 * x3 + x4 * (x2 + x3);
      const float total = z[0][i] + z[1][i] + z[2][i] + z[3][i];
      const float nan = total != total ? total : 0.0f;
      float a = positive(z[0][i] - inverse_lam_ * cut1) + nan;
      float b = positive(z[1][i] - inverse_lam_ * cut2) + nan;
      float c = (keeps3 > 0.0f ? positive(z[2][i] - inverse_lam_ * cut3) : 0.0f) + nan;
      float d = (dense[i] ? positive(z[3][i] - inverse_lam_ * cut4) : 0.0f) + nan;
      restore(a, b, order[i], 32);
      restore(b, c, order[i], 16), restore(a, b, order[i], 8);
      restore(c, d, order[i], 4), restore(b, c, order[i], 2), restore(a, b, order[i], 1);
      z[0][i] = a, z[1][i] = b, z[2][i] = c, z[3][i] = d;
    }
  }

  // Magnitude with the sign of z; zero is +0.0 and NaN passes through.
  static PROXSPARSE_INLINE float signed_like(float magnitude, float z) {
    return magnitude == 0.0f ? 0.0f : std::copysign(magnitude, z);
  }

  float lam_, inverse_lam_;
};

}  // namespace proxsparse
