#include "gates.h"
#include "kernels.h"

namespace proxsparse {

// Elements whose step and prior are computed, and whose successors are fetched, close together: the
// first waits for the divider, the second for shuffles and the third for memory.
constexpr int kBlock = 128;

PROXSPARSE_CLONES static void gate_update_range(const GateCall& call, std::int64_t begin,
                                                std::int64_t end) {
  const Prox prox(call.lam);
  const Adam adam(call.adam);
  const Bounds bounds = call.bounds;
  alignas(64) float buffer_s[kTile], buffer_g[kTile], buffer_w0[kTile], buffer_m[kTile];
  alignas(64) float buffer_v[kTile], buffer_norms[kTile], gate[kTile], importance[kTile];
  alignas(64) Lanes prior[4], z[4];
  for (std::int64_t at = begin; at < end; at += kTile) {
    const int n = static_cast<int>(end - at < kTile ? end - at : kTile);
    const float* s = call.s.read(at, n, buffer_s);
    const float* g = call.grad.read(at, n, buffer_g);
    const float* w0 = call.w0.read(at, n, buffer_w0);
    const float* m = call.m.read(at, n, buffer_m);
    const float* v = call.v.read(at, n, buffer_v);
    float* new_s = call.s.target(at, n, buffer_s);
    float* new_m = call.m.target(at, n, buffer_m);
    float* new_v = call.v.target(at, n, buffer_v);
    const float* norms = read_norms(call, at, n, buffer_norms);
    for (int i = 0; i < kTile; i += kBlock) {
      PROXSPARSE_SIMD
      for (int j = i; j < i + kBlock; ++j) {
        float moment1 = m[j], moment2 = v[j];
        const float step = adam.update(g[j] * w0[j] * adam.grad_scale, moment1, moment2);
        gate[j] = bounds.clip(s[j] - step);
        importance[j] = std::fabs(w0[j]) * norms[j];
        new_m[j] = moment1, new_v[j] = moment2;
      }
      gate_prior(importance, gate, bounds, i / 4, (i + kBlock) / 4, prior, z);
      if (at + kTile < end) {
        const std::int64_t ahead = at + kTile + i;
        call.s.prefetch(ahead, kBlock), call.grad.prefetch(ahead, kBlock);
        call.w0.prefetch(ahead, kBlock);
        call.m.prefetch(ahead, kBlock), call.v.prefetch(ahead, kBlock);
      }
    }
    prox.solve(z);
    gates_of(z, prior, bounds, new_s);
    call.m.write(at, n, new_m);
    call.v.write(at, n, new_v);
    call.s.write(at, n, new_s);
    if (call.out.data != nullptr) {
      // The gate as it was stored, so that a low-precision gate and its weight agree.
      const float* stored = call.s.read(at, n, buffer_s);
      if (call.hard) {
        keep_two(w0, prior, stored, gate);
      } else {
        PROXSPARSE_SIMD
        for (int i = 0; i < kTile; ++i) gate[i] = w0[i] * stored[i];
      }
      call.out.write(at, n, gate);
    }
  }
}

void gate_update(Operand s, Operand grad, Operand w0, Operand m, Operand v, Operand act_norm,
                 Operand out, std::int64_t size, std::int64_t out_features,
                 std::int64_t in_features, AdamStep adam, float lam, bool hard, int threads) {
  const GateCall call{s, grad, w0, m, v, act_norm, out, out_features, in_features, adam, lam, hard};
  parallel_ranges(size, kTile, 1 << 13, threads, [&](std::int64_t begin, std::int64_t end) {
    gate_update_range(call, begin, end);
  });
}

}  // namespace proxsparse
