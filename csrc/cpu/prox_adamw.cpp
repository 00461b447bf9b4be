#include "adam.h"
#include "kernels.h"
#include "solver.h"

namespace proxsparse {

namespace {

struct Call {
  Operand p, grad, m, v;
  FrozenRegularizer frozen;
  AdamStep adam;
  double weight_decay;
  float lam;
};

}  // namespace

PROXSPARSE_CLONES static void prox_adamw_range(const Call& call, std::int64_t begin,
                                               std::int64_t end) {
  const Prox prox(call.lam);
  const Adam adam(call.adam);
  const float keep = static_cast<float>(1.0 - call.adam.lr * call.weight_decay);
  alignas(64) float buffer_p[kTile], buffer_g[kTile], buffer_m[kTile], buffer_v[kTile];
  alignas(64) float buffer_w0[kTile], pulled[kTile], w[kTile];
  for (std::int64_t at = begin; at < end; at += kTile) {
    const int n = static_cast<int>(end - at < kTile ? end - at : kTile);
    const float* p = call.p.read(at, n, buffer_p);
    const float* g = call.grad.read(at, n, buffer_g);
    const float* m = call.m.read(at, n, buffer_m);
    const float* v = call.v.read(at, n, buffer_v);
    float* new_m = call.m.target(at, n, buffer_m);
    float* new_v = call.v.target(at, n, buffer_v);
    float grad_scale = adam.grad_scale;
    if (call.frozen.lam2 != 0.0f) {
      const float* w0 = call.frozen.w0.read(at, n, buffer_w0);
      const float eps = call.frozen.eps, strength = 2.0f * call.frozen.lam2;
      PROXSPARSE_SIMD
      for (int i = 0; i < kTile; ++i) {
        const float r = 1.0f / (w0[i] < 0.0f ? w0[i] - eps : w0[i] + eps);
        const float pull = r * p[i] * (p[i] - w0[i]) * r * (2.0f * p[i] - w0[i]);
        pulled[i] = grad_scale * g[i] + strength * pull;
      }
      g = pulled;
      grad_scale = 1.0f;
    }
    PROXSPARSE_SIMD
    for (int i = 0; i < kTile; ++i) {
      float moment1 = m[i], moment2 = v[i];
      w[i] = p[i] * keep - adam.update(g[i] * grad_scale, moment1, moment2);
      new_m[i] = moment1, new_v[i] = moment2;
    }
    prox.apply(w);
    call.m.write(at, n, new_m);
    call.v.write(at, n, new_v);
    call.p.write(at, n, w);
  }
}

void prox_adamw(Operand p, Operand grad, Operand m, Operand v, std::int64_t size, AdamStep adam,
                double weight_decay, float lam, FrozenRegularizer frozen, int threads) {
  const Call call{p, grad, m, v, frozen, adam, weight_decay, lam};
  parallel_ranges(size, kTile, 1 << 13, threads, [&](std::int64_t begin, std::int64_t end) {
    prox_adamw_range(call, begin, end);
  });
}

}  // namespace proxsparse
