// The CPU kernels behind proxsparse.backends.cpu. Sizes count elements; `threads` is an upper
// bound.
#pragma once

#include "tensor_view.h"

namespace proxsparse {

// Adam's scalars of one step, in double so that the bias corrections keep their digits.
struct AdamStep {
  double step, lr, grad_scale, beta1, beta2, eps;
};

void prox_2to4(Operand z, Operand out, std::int64_t size, float lam, int threads);

struct FrozenRegularizer {
  Operand w0;
  float lam2, eps;
};
void prox_adamw(Operand p, Operand grad, Operand m, Operand v, std::int64_t size, AdamStep adam,
                double weight_decay, float lam, FrozenRegularizer frozen, int threads);

// Gates [E, N, K] of `size` elements with norms [E, K]; `out` may be null.
void gate_update(Operand s, Operand grad, Operand w0, Operand m, Operand v, Operand act_norm,
                 Operand out, std::int64_t size, std::int64_t out_features,
                 std::int64_t in_features, AdamStep adam, float lam, bool hard, int threads);

void gate_project(Operand s, Operand w0, Operand act_norm, Operand out, std::int64_t size,
                  std::int64_t out_features, std::int64_t in_features, int threads);

// Exact ops work on the bit patterns. `score` may be the same tensor as `w`.
void project_2to4(Operand w, Operand score, Operand out, std::int64_t size, int threads);
void mask_2to4(Operand score, bool* out, std::int64_t size, int threads);
bool is_2to4(Operand w, std::int64_t size, int threads);
void pack_2to4(Operand w, void* values, std::uint8_t* codes, std::int64_t rows,
               std::int64_t in_features, int threads);
void unpack_2to4(Operand values, const std::uint8_t* codes, void* out, std::int64_t rows,
                 std::int64_t in_features, int threads);

}  // namespace proxsparse
