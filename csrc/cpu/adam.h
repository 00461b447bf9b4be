// The Adam moments of one tile, shared by prox_adamw.cpp and gate_update.cpp.
#pragma once

#include <cmath>

#include "kernels.h"

namespace proxsparse {

struct Adam {
  float beta1, one_beta1, beta2, one_beta2, eps, step_size, inverse_bias2, grad_scale;

  explicit Adam(const AdamStep& adam)
      : beta1(static_cast<float>(adam.beta1)),
        one_beta1(static_cast<float>(1.0 - adam.beta1)),
        beta2(static_cast<float>(adam.beta2)),
        one_beta2(static_cast<float>(1.0 - adam.beta2)),
        eps(static_cast<float>(adam.eps)),
        step_size(static_cast<float>(adam.lr / (1.0 - std::pow(adam.beta1, adam.step)))),
        inverse_bias2(static_cast<float>(1.0 / (1.0 - std::pow(adam.beta2, adam.step)))),
        grad_scale(static_cast<float>(adam.grad_scale)) {}

  // lr * mhat / (sqrt(vhat) + eps) for one element; m and v become the new moments.
  PROXSPARSE_INLINE float update(float grad, float& m, float& v) const {
    m = beta1 * m + one_beta1 * grad;
    v = beta2 * v + one_beta2 * grad * grad;
    return step_size * m / (std::sqrt(v * inverse_bias2) + eps);
  }
};

}  // namespace proxsparse
