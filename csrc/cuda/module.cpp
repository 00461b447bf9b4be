// Python bindings: tensors arrive as addresses, checked by proxsparse.backends.cuda.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cusparselt_api.h"
#include "cusparselt_product.h"
#ifdef PROXSPARSE_HAS_KERNELS
#include "capture.h"
#include "sparse_linear_decode.h"
#include "sparse_linear_prefill.h"
#endif

namespace py = pybind11;
#ifdef PROXSPARSE_HAS_KERNELS
using proxsparse::DecodeWeight;
#endif
using proxsparse::Problem;
using proxsparse::ValueType;

namespace {

using Address = std::uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

#ifdef PROXSPARSE_HAS_KERNELS
// One of our kernels, in one of its layouts, for weights of one shape.
template <typename Layout, bool kIsFp8 = false>
struct Kernel {
  bool is_bfloat16;  // else float16
  int n, k;
  Layout layout;
};
using Decode = Kernel<proxsparse::DecodeLayout>;
using Prefill = Kernel<proxsparse::PrefillLayout>;
using DecodeFp8 = Kernel<proxsparse::DecodeLayout, true>;
using PrefillFp8 = Kernel<proxsparse::PrefillLayout, true>;

template <typename Layout, bool kIsFp8 = false, typename... Fields>
Kernel<Layout, kIsFp8> make_kernel(int type, int n, int k, Fields... fields) {
  return {static_cast<ValueType>(type) == ValueType::kBFloat16, n, k, {fields...}};
}

DecodeWeight make_weight(int n, Address values, Address codes, Address bias, Address out) {
  return {pointer(values), pointer(codes), pointer(bias), pointer(out), n};
}

const float* scales(Address address) { return static_cast<const float*>(pointer(address)); }

void decode(bool is_bfloat16, int tokens, int k, Address x, const DecodeWeight* weights,
            int num_weights, proxsparse::DecodeLayout layout, bool may_start_early, Address stream,
            bool is_fp8 = false, Address token_scales = 0) {
  const char* error = proxsparse::sparse_linear_decode(
      {pointer(x), weights, num_weights, tokens, k, k, is_bfloat16, layout, may_start_early,
       pointer(stream), is_fp8, scales(token_scales)});
  if (error == nullptr) return;
  std::string shapes;
  for (int i = 0; i < num_weights; ++i) {
    shapes += (i == 0 ? " W [" : ", [") + std::to_string(weights[i].out_features) + ", " +
              std::to_string(k) + "]";
  }
  throw std::runtime_error("sparse_linear_decode failed for" + shapes + " and " +
                           std::to_string(tokens) + " tokens: " + error);
}

// Bytes of workspace that the call needs, if they were too few; else 0.
std::size_t prefill(const proxsparse::PrefillCall& call) {
  std::size_t needed_bytes = 0;
  const char* error = proxsparse::sparse_linear_prefill(call, needed_bytes);
  if (error == nullptr) return needed_bytes;
  throw std::runtime_error("sparse_linear_prefill failed for W [" +
                           std::to_string(call.out_features) + ", " +
                           std::to_string(call.in_features) + "] and " +
                           std::to_string(call.tokens) + " tokens: " + error);
}
#endif

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

#ifdef PROXSPARSE_HAS_KERNELS
  m.attr("has_kernels") = true;
  m.attr("MAX_DECODE_WEIGHTS") = proxsparse::kMaxDecodeWeights;
  py::class_<Decode>(m, "Decode")
      .def(py::init(&make_kernel<proxsparse::DecodeLayout, false, int, int, int>), py::arg("type"),
           py::arg("n"), py::arg("k"), py::arg("rows"), py::arg("depth"), py::arg("splits"))
      .def(
          "__call__",
          [](const Decode& kernel, int tokens, Address x, Address values, Address codes,
             Address bias, Address out, bool may_start_early, Address stream) {
            const DecodeWeight weight = make_weight(kernel.n, values, codes, bias, out);
            decode(kernel.is_bfloat16, tokens, kernel.k, x, &weight, 1, kernel.layout,
                   may_start_early, stream);
          },
          unlocked());
  m.def(
      "sparse_linear_group",
      [](int type, int tokens, int k, Address x,
         const std::vector<std::tuple<int, Address, Address, Address, Address>>& operands,
         bool may_start_early, Address stream) {
        std::vector<DecodeWeight> weights;
        for (const auto& of_one : operands) weights.push_back(std::apply(make_weight, of_one));
        decode(static_cast<ValueType>(type) == ValueType::kBFloat16, tokens, k, x, weights.data(),
               static_cast<int>(weights.size()), {}, may_start_early, stream);
      },
      unlocked());
  m.def("capture_of", [](Address stream) { return proxsparse::capture_of(pointer(stream)); });
  py::class_<Prefill>(m, "Prefill")
      .def(py::init(&make_kernel<proxsparse::PrefillLayout, false, int, int, int>), py::arg("type"),
           py::arg("n"), py::arg("k"), py::arg("rows"), py::arg("tokens"), py::arg("cluster"))
      .def(
          "__call__",
          [](const Prefill& kernel, int tokens, Address x, Address values, Address codes,
             Address bias, Address out, bool may_start_early, Address stream, Address signals,
             Address workspace, std::size_t workspace_bytes) {
            return prefill({pointer(x), pointer(values), pointer(codes), pointer(bias),
                            pointer(out), tokens, kernel.k, kernel.n, kernel.k, kernel.is_bfloat16,
                            kernel.layout, may_start_early, pointer(workspace), workspace_bytes,
                            static_cast<int*>(pointer(signals)), pointer(stream)});
          },
          unlocked());
  py::class_<DecodeFp8>(m, "DecodeFp8")
      .def(py::init(&make_kernel<proxsparse::DecodeLayout, true, int, int, int>), py::arg("type"),
           py::arg("n"), py::arg("k"), py::arg("rows"), py::arg("depth"), py::arg("splits"))
      .def(
          "__call__",
          [](const DecodeFp8& kernel, int tokens, Address x, Address token_scales, Address values,
             Address codes, Address row_scales, Address bias, Address out, bool may_start_early,
             Address stream) {
            DecodeWeight weight = make_weight(kernel.n, values, codes, bias, out);
            weight.row_scales = scales(row_scales);
            decode(kernel.is_bfloat16, tokens, kernel.k, x, &weight, 1, kernel.layout,
                   may_start_early, stream, true, token_scales);
          },
          unlocked());
  py::class_<PrefillFp8>(m, "PrefillFp8")
      .def(py::init(&make_kernel<proxsparse::PrefillLayout, true, int, int, int>), py::arg("type"),
           py::arg("n"), py::arg("k"), py::arg("rows"), py::arg("tokens"), py::arg("cluster"))
      .def(
          "__call__",
          [](const PrefillFp8& kernel, int tokens, Address x, Address token_scales, Address values,
             Address codes, Address row_scales, Address bias, Address out, bool may_start_early,
             Address stream, Address signals, Address workspace, std::size_t workspace_bytes) {
            return prefill({pointer(x), pointer(values), pointer(codes), pointer(bias),
                            pointer(out), tokens, kernel.k, kernel.n, kernel.k, kernel.is_bfloat16,
                            kernel.layout, may_start_early, pointer(workspace), workspace_bytes,
                            static_cast<int*>(pointer(signals)), pointer(stream), true,
                            scales(token_scales), scales(row_scales)});
          },
          unlocked());
#else
  m.attr("has_kernels") = false;
#endif
}
