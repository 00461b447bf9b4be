// Python bindings: tensors arrive as addresses, checked by proxsparse.backend_cuda.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "cusparselt.h"
#include "sparse_linear.h"
#ifdef PROXSPARSE_HAS_DECODE
#include "sparse_linear_decode.h"
#endif

namespace py = pybind11;
using proxsparse::Problem;
using proxsparse::ValueType;

namespace {

using Address = std::uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA side of proxsparse; call it through proxsparse.ops.";
  m.attr("LIBRARY_CHOICE") = proxsparse::kLibraryChoice;
  py::register_exception<proxsparse::cusparselt::LibraryError>(m, "LibraryError",
                                                               PyExc_RuntimeError);
  using unlocked = py::call_guard<py::gil_scoped_release>;

  m.def(
      "load_cusparselt",
      [](const std::string& path) {
        const auto& [major, minor, patch] = proxsparse::cusparselt::load(path).version;
        return std::make_tuple(major, minor, patch);
      },
      unlocked());

  py::class_<Problem>(m, "SparseLinear")
      .def(py::init([](int device, int type, std::int64_t n, std::int64_t k, bool has_bias,
                       int algorithm, int split_k, int split_k_mode, bool is_bias_late) {
             return Problem{device,      static_cast<ValueType>(type),
                            n,           k,
                            has_bias,    algorithm,
                            split_k,     split_k_mode,
                            is_bias_late};
           }),
           py::arg("device"), py::arg("type"), py::arg("n"), py::arg("k"), py::arg("has_bias"),
           py::arg("algorithm"), py::arg("split_k"), py::arg("split_k_mode"),
           py::arg("is_bias_late"))
      .def(
          "__call__",
          [](const Problem& problem, std::int64_t tokens, Address weight, std::size_t weight_bytes,
             Address x, Address bias, Address out, Address workspace, std::size_t workspace_bytes,
             Address stream) {
            return proxsparse::sparse_linear(
                problem, {tokens, pointer(weight), weight_bytes, pointer(x), pointer(bias),
                          pointer(out), pointer(workspace), workspace_bytes, pointer(stream)});
          },
          unlocked())
      .def(
          "count_algorithms",
          [](const Problem& problem, std::int64_t tokens, Address bias) {
            return proxsparse::count_algorithms(problem, tokens, pointer(bias));
          },
          unlocked());

  m.def(
      "compressed_size",
      [](int device, int type, std::int64_t n, std::int64_t k) {
        return proxsparse::compressed_size(device, static_cast<ValueType>(type), n, k);
      },
      unlocked());
  m.def(
      "compress_2to4",
      [](int device, int type, std::int64_t n, std::int64_t k, Address w, Address compressed,
         Address scratch, Address stream) {
        proxsparse::compress_2to4(device, static_cast<ValueType>(type), n, k, pointer(w),
                                  pointer(compressed), pointer(scratch), pointer(stream));
      },
      unlocked());

#ifdef PROXSPARSE_HAS_DECODE
  m.attr("has_decode") = true;
  m.def(
      "sparse_linear_decode",
      [](int type, int tokens, int n, int k, Address x, std::int64_t x_stride, Address values,
         Address codes, Address bias, Address out, int rows, int depth, int splits,
         bool may_start_early, Address stream) {
        const char* error =
            proxsparse::sparse_linear_decode({pointer(x),
                                              pointer(values),
                                              pointer(codes),
                                              pointer(bias),
                                              pointer(out),
                                              tokens,
                                              n,
                                              k,
                                              x_stride,
                                              static_cast<ValueType>(type) == ValueType::kBFloat16,
                                              {rows, depth, splits},
                                              may_start_early,
                                              pointer(stream)});
        if (error != nullptr) {
          throw std::runtime_error("sparse_linear_decode failed for W [" + std::to_string(n) +
                                   ", " + std::to_string(k) + "] and " + std::to_string(tokens) +
                                   " tokens: " + error);
        }
      },
      unlocked());
#else
  m.attr("has_decode") = false;
#endif
}
