#include "gates.h"
#include "kernels.h"

namespace proxsparse {

// The hard `out` of gate_update, from gates as they are.
PROXSPARSE_CLONES static void gate_project_range(const GateCall& call, std::int64_t begin,
                                                 std::int64_t end) {
  alignas(64) float buffer_s[kTile], buffer_w0[kTile], buffer_norms[kTile], kept[kTile];
  alignas(64) float importance[kTile];
  alignas(64) Lanes prior[4], z[4];
  for (std::int64_t at = begin; at < end; at += kTile) {
    const int n = static_cast<int>(end - at < kTile ? end - at : kTile);
    const float* s = call.s.read(at, n, buffer_s);
    const float* w0 = call.w0.read(at, n, buffer_w0);
    const float* norms = read_norms(call, at, n, buffer_norms);
    PROXSPARSE_SIMD
    for (int i = 0; i < kTile; ++i) importance[i] = std::fabs(w0[i]) * norms[i];
    gate_prior(importance, s, call.bounds, 0, kLanes, prior, z);
    keep_two(w0, prior, s, kept);
    call.out.write(at, n, kept);
  }
}

void gate_project(Operand s, Operand w0, Operand act_norm, Operand out, std::int64_t size,
                  std::int64_t out_features, std::int64_t in_features, int threads) {
  GateCall call{};
  call.s = s, call.w0 = w0, call.act_norm = act_norm, call.out = out;
  call.out_features = out_features, call.in_features = in_features;
  parallel_ranges(size, kTile, 1 << 14, threads, [&](std::int64_t begin, std::int64_t end) {
    gate_project_range(call, begin, end);
  });
}

}  // namespace proxsparse
