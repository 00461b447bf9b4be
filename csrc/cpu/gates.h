// What gate_update and gate_project share: the prior, and which two weights of a group it keeps.
#pragma once

#include <cmath>

#include "adam.h"
#include "solver.h"
#include "tensor_view.h"

namespace proxsparse {

// Kept in variables, so that each side of a clip is one instruction of x86: against a constant GCC
// compares and blends. NaN passes through a clip.
struct Bounds {
  float lower = 0.0f, upper = 1.0f;  // of a gate
  float floor = 1e-3f;               // of the prior, reference.PRIOR_FLOOR

  PROXSPARSE_INLINE float clip(float gate) const {
    const float above = lower > gate ? lower : gate;
    return above > upper ? upper : above;
  }

  PROXSPARSE_INLINE float raise(float prior) const { return floor < prior ? prior : floor; }
};

struct GateCall {
  Operand s, grad, w0, m, v, act_norm, out;
  std::int64_t out_features, in_features;
  AdamStep adam;
  float lam;
  bool hard;
  Bounds bounds = {};
};

// The norms [E, K] of elements [at, at + n) of gates [E, N, K]: where they lie if a row holds all
// of them, else collected row by row.
PROXSPARSE_INLINE const float* read_norms(const GateCall& call, std::int64_t at, int n,
                                          float* norms) {
  std::int64_t row = at / call.in_features, column = at % call.in_features;
  if (column + n <= call.in_features) {
    return call.act_norm.read(row / call.out_features * call.in_features + column, n, norms);
  }
  alignas(64) float buffer[kTile];
  for (int i = 0; i < n;) {
    const std::int64_t left = call.in_features - column;
    const int run = static_cast<int>(left < n - i ? left : n - i);
    const std::int64_t source = row / call.out_features * call.in_features + column;
    std::memcpy(norms + i, call.act_norm.read(source, run, buffer), sizeof(float) * run);
    i += run;
    ++row;
    column = 0;
  }
  for (int i = n; i < kTile; ++i) norms[i] = 0.0f;
  return norms;
}

// What scales a group to RMS 1; 0 for a group of zeros.
PROXSPARSE_INLINE float to_unit_rms(float a, float b, float c, float d) {
  const float rms = std::sqrt(0.25f * (a * a + b * b + c * c + d * d));
  return rms > 0.0f ? 1.0f / rms : 0.0f;
}

// In groups [begin, end): the prior, which is the importance |w0| * norm to the power 1.5, scaled
// to RMS 1 in each group and floored (reference.gate_prior), and its product with the gates: z, the
// point whose prox is taken.
PROXSPARSE_INLINE void gate_prior(const float* importance, const float* gate, const Bounds& bounds,
                                  int begin, int end, Lanes (&prior)[4], Lanes (&z)[4]) {
  PROXSPARSE_SIMD
  for (int i = begin; i < end; ++i) {
    float a = importance[4 * i], b = importance[4 * i + 1];
    float c = importance[4 * i + 2], d = importance[4 * i + 3];
    // Before the power as well, which would overflow or underflow where weights are far from 1.
    const float unit = to_unit_rms(a, b, c, d);
    a *= unit, b *= unit, c *= unit, d *= unit;
    a *= std::sqrt(a), b *= std::sqrt(b), c *= std::sqrt(c), d *= std::sqrt(d);
    const float scale = to_unit_rms(a, b, c, d);
    prior[0][i] = bounds.raise(a * scale), prior[1][i] = bounds.raise(b * scale);
    prior[2][i] = bounds.raise(c * scale), prior[3][i] = bounds.raise(d * scale);
    z[0][i] = prior[0][i] * gate[4 * i], z[1][i] = prior[1][i] * gate[4 * i + 1];
    z[2][i] = prior[2][i] * gate[4 * i + 2], z[3][i] = prior[3][i] * gate[4 * i + 3];
  }
}

// The gates of z: z / prior, clipped.
PROXSPARSE_INLINE void gates_of(const Lanes (&z)[4], const Lanes (&prior)[4], const Bounds& bounds,
                                float* gate) {
  PROXSPARSE_SIMD
  for (int i = 0; i < kLanes; ++i) {
    gate[4 * i] = bounds.clip(z[0][i] / prior[0][i]);
    gate[4 * i + 1] = bounds.clip(z[1][i] / prior[1][i]);
    gate[4 * i + 2] = bounds.clip(z[2][i] / prior[2][i]);
    gate[4 * i + 3] = bounds.clip(z[3][i] / prior[3][i]);
  }
}

// w0 at the two largest prior*s of each group, +0.0 elsewhere; ties keep the lower index.
PROXSPARSE_INLINE void keep_two(const float* w0, const Lanes (&prior)[4], const float* s,
                                float* out) {
  PROXSPARSE_SIMD
  for (int i = 0; i < kLanes; ++i) {
    const float a = prior[0][i] * s[4 * i], b = prior[1][i] * s[4 * i + 1];
    const float c = prior[2][i] * s[4 * i + 2], d = prior[3][i] * s[4 * i + 3];
    const int ab = a >= b, ac = a >= c, ad = a >= d, bc = b >= c, bd = b >= d, cd = c >= d;
    // Read in any case: a load under a condition would keep the loop from being vectorised.
    const float w1 = w0[4 * i], w2 = w0[4 * i + 1], w3 = w0[4 * i + 2], w4 = w0[4 * i + 3];
    out[4 * i] = ab + ac + ad >= 2 ? w1 : 0.0f;
    out[4 * i + 1] = 1 - ab + bc + bd >= 2 ? w2 : 0.0f;
    out[4 * i + 2] = 2 - ac - bc + cd >= 2 ? w3 : 0.0f;
    out[4 * i + 3] = 3 - ad - bd - cd >= 2 ? w4 : 0.0f;
  }
}

}  // namespace proxsparse
