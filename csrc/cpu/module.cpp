// Python bindings: each tensor arrives as (data pointer, dtype code), checked by
// proxsparse.backends.cpu.

#include <pybind11/pybind11.h>

#include <utility>

#include "kernels.h"

namespace py = pybind11;
using proxsparse::AdamStep;
using proxsparse::Dtype;
using proxsparse::Operand;

namespace {

using Tensor = std::pair<std::uintptr_t, int>;

Operand operand(const Tensor& tensor) {
  return {reinterpret_cast<void*>(tensor.first), static_cast<Dtype>(tensor.second)};
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of proxsparse; call them through proxsparse.ops.";
#ifdef _OPENMP
  m.attr("has_openmp") = true;
#else
  m.attr("has_openmp") = false;
#endif
  using unlocked = py::call_guard<py::gil_scoped_release>;

  m.def(
      "prox_2to4",
      [](Tensor z, Tensor out, std::int64_t size, float lam, int threads) {
        proxsparse::prox_2to4(operand(z), operand(out), size, lam, threads);
      },
      unlocked());
  m.def(
      "prox_adamw",
      [](Tensor p, Tensor grad, Tensor m, Tensor v, std::int64_t size, double step, double lr,
         float lam, double grad_scale, Tensor w0, float lam2, float reg_eps, double beta1,
         double beta2, double eps, double weight_decay, int threads) {
        const AdamStep adam{step, lr, grad_scale, beta1, beta2, eps};
        proxsparse::prox_adamw(operand(p), operand(grad), operand(m), operand(v), size, adam,
                               weight_decay, lam, {operand(w0), lam2, reg_eps}, threads);
      },
      unlocked());
  m.def(
      "gate_update",
      [](Tensor s, Tensor grad, Tensor w0, Tensor m, Tensor v, Tensor act_norm, Tensor out,
         std::int64_t size, std::int64_t out_features, std::int64_t in_features, double step,
         double lr, float lam, double grad_scale, double beta1, double beta2, double eps, bool hard,
         int threads) {
        const AdamStep adam{step, lr, grad_scale, beta1, beta2, eps};
        proxsparse::gate_update(operand(s), operand(grad), operand(w0), operand(m), operand(v),
                                operand(act_norm), operand(out), size, out_features, in_features,
                                adam, lam, hard, threads);
      },
      unlocked());
  m.def(
      "gate_project",
      [](Tensor s, Tensor w0, Tensor act_norm, Tensor out, std::int64_t size,
         std::int64_t out_features, std::int64_t in_features, int threads) {
        proxsparse::gate_project(operand(s), operand(w0), operand(act_norm), operand(out), size,
                                 out_features, in_features, threads);
      },
      unlocked());
  m.def(
      "project_2to4",
      [](Tensor w, Tensor score, Tensor out, std::int64_t size, int threads) {
        proxsparse::project_2to4(operand(w), operand(score), operand(out), size, threads);
      },
      unlocked());
  m.def(
      "mask_2to4",
      [](Tensor score, std::uintptr_t out, std::int64_t size, int threads) {
        proxsparse::mask_2to4(operand(score), pointer<bool>(out), size, threads);
      },
      unlocked());
  m.def(
      "is_2to4",
      [](Tensor w, std::int64_t size, int threads) {
        return proxsparse::is_2to4(operand(w), size, threads);
      },
      unlocked());
  m.def(
      "pack_2to4",
      [](Tensor w, std::uintptr_t values, std::uintptr_t codes, std::int64_t rows,
         std::int64_t in_features, int threads) {
        proxsparse::pack_2to4(operand(w), pointer<void>(values), pointer<std::uint8_t>(codes), rows,
                              in_features, threads);
      },
      unlocked());
  m.def(
      "unpack_2to4",
      [](Tensor values, std::uintptr_t codes, std::uintptr_t out, std::int64_t rows,
         std::int64_t in_features, int threads) {
        proxsparse::unpack_2to4(operand(values), pointer<std::uint8_t>(codes), pointer<void>(out),
                                rows, in_features, threads);
      },
      unlocked());
}
