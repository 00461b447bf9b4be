#include "cusparselt_product.h"

#include <dlfcn.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <unordered_map>

#include "cusparselt_api.h"

namespace proxsparse {

namespace {

namespace lt = cusparselt;

constexpr std::uint32_t kAlignment = 16;  // bytes, of every operand's address
// Plans a thread keeps per device. When there are more, all are dropped and made again as needed:
// slow for a program that lives with so many token counts, and never wrong.
constexpr std::size_t kMaxPlans = 4096;

struct TypeTraits {
  const char* name;
  int value, compute;
};

const TypeTraits& traits(ValueType type) {
  static constexpr TypeTraits kTraits[] = {
      {"bfloat16", lt::kReal16BF, lt::kCompute32F},
      {"float16", lt::kReal16F, lt::kCompute32F},
  };
  return kTraits[static_cast<int>(type)];
}

std::string shape(std::int64_t rows, std::int64_t columns) {
  return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

std::string describe_weight(int device, ValueType type, std::int64_t n, std::int64_t k) {
  return std::string(traits(type).name) + " W " + shape(n, k) +
         " on cuda:" + std::to_string(device);
}

std::string describe(const Problem& p, std::int64_t m) {
  const std::string algorithm =
      p.algorithm == kLibraryChoice ? "default" : std::to_string(p.algorithm);
  return describe_weight(p.device, p.type, p.n, p.k) + ", x " + shape(m, p.k) +
         (p.has_bias ? ", with bias" : ", no bias") + ", algorithm " + algorithm + ", split-k " +
         std::to_string(p.split_k) + " mode " + std::to_string(p.split_k_mode);
}

// The two driver functions used, from the CUDA 13.0 header (unchanged since CUDA 10.1); CUresult is
// 0 on success. The driver is in the process already: the caller's pointers came from it.
struct Driver {
  int (*get_device)(int*);
  int (*exchange_capture_mode)(int*);
};

const Driver& driver() {
  static const Driver found = [] {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
    const Driver functions{
        reinterpret_cast<int (*)(int*)>(dlsym(library, "cuCtxGetDevice")),
        reinterpret_cast<int (*)(int*)>(dlsym(library, "cuThreadExchangeStreamCaptureMode"))};
    if (!functions.get_device || !functions.exchange_capture_mode) {
      throw std::runtime_error("libcuda.so.1 lacks cuCtxGetDevice or the capture functions");
    }
    return functions;
  }();
  return found;
}

void check_driver(int result, const char* call) {
  if (result) {
    throw std::runtime_error(std::string(call) + " failed with CUresult " + std::to_string(result));
  }
}

// Handles and plans may allocate, which a stream under capture forbids to its thread unless the
// thread's mode is relaxed.
class RelaxedCapture {
 public:
  RelaxedCapture() {
    check_driver(driver().exchange_capture_mode(&mode_), "cuThreadExchangeStreamCaptureMode");
  }
  ~RelaxedCapture() { driver().exchange_capture_mode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  int mode_ = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED; afterwards what it was before
};

// One object of the library: destroyed with its owner, if it was made, and never moved.
template <class Object, lt::Status (*lt::Api::*destroy)(const Object*)>
class Owned {
 public:
  Owned() = default;
  ~Owned() {
    if (is_made_) (lt::api().*destroy)(&object_);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  template <class Init, class Describe>
  void make(const char* call, Init&& init, Describe&& where) {
    lt::check(init(&object_), call, where);
    is_made_ = true;
  }
  Object* get() { return &object_; }

 private:
  Object object_{};
  bool is_made_ = false;
};

using OwnedHandle = Owned<lt::Handle, &lt::Api::cusparseLtDestroy>;
using OwnedMatrix = Owned<lt::MatDescriptor, &lt::Api::cusparseLtMatDescriptorDestroy>;
using OwnedSelection = Owned<lt::AlgSelection, &lt::Api::cusparseLtMatmulAlgSelectionDestroy>;
using OwnedPlan = Owned<lt::MatmulPlan, &lt::Api::cusparseLtMatmulPlanDestroy>;

void make_weight(const lt::Handle* handle, OwnedMatrix& w, int device, ValueType type,
                 std::int64_t n, std::int64_t k) {
  w.make(
      "cusparseLtStructuredDescriptorInit",
      [&](lt::MatDescriptor* descriptor) {
        return lt::api().cusparseLtStructuredDescriptorInit(handle, descriptor, k, n, k, kAlignment,
                                                            traits(type).value, lt::kColumnMajor,
                                                            lt::kSparsity50Percent);
      },
      [&] { return describe_weight(device, type, n, k); });
}

// The operands of a product and the choice of algorithm; the members refer to one another.
struct Setup {
  OwnedMatrix w, x, out;
  lt::MatmulDescriptor matmul{};
  OwnedSelection selection;

  Setup(const lt::Handle* handle, const Problem& p, std::int64_t m, const void* bias) {
    const lt::Api& library = lt::api();
    const auto where = [&] { return describe(p, m); };
    const TypeTraits& type = traits(p.type);
    make_weight(handle, w, p.device, p.type, p.n, p.k);
    const auto make_dense = [&](OwnedMatrix& matrix, std::int64_t rows, std::int64_t columns) {
      matrix.make(
          "cusparseLtDenseDescriptorInit",
          [&](lt::MatDescriptor* descriptor) {
            return library.cusparseLtDenseDescriptorInit(handle, descriptor, rows, columns, rows,
                                                         kAlignment, type.value, lt::kColumnMajor);
          },
          where);
    };
    make_dense(x, p.k, m);
    make_dense(out, p.n, m);
    lt::check(library.cusparseLtMatmulDescriptorInit(handle, &matmul, lt::kTranspose,
                                                     lt::kNonTranspose, w.get(), x.get(), out.get(),
                                                     out.get(), type.compute),
              "cusparseLtMatmulDescriptorInit", where);
    // Before the plan, which has to know that there is one.
    if (p.has_bias) set_bias(handle, bias, where);
    selection.make(
        "cusparseLtMatmulAlgSelectionInit",
        [&](lt::AlgSelection* object) {
          return library.cusparseLtMatmulAlgSelectionInit(handle, object, &matmul,
                                                          lt::kAlgorithmDefault);
        },
        where);
    if (p.algorithm != kLibraryChoice) select(handle, lt::kAlgorithmId, p.algorithm, where);
    if (p.split_k != 1) select(handle, lt::kSplitK, p.split_k, where);
    if (p.split_k_mode != 0) select(handle, lt::kSplitKMode, p.split_k_mode, where);
  }

  template <class Describe>
  void set_bias(const lt::Handle* handle, const void* bias, Describe&& where) {
    lt::check(lt::api().cusparseLtMatmulDescSetAttribute(handle, &matmul, lt::kBiasPointer, &bias,
                                                         sizeof bias),
              "cusparseLtMatmulDescSetAttribute(bias pointer)", where);
  }

 private:
  template <class Describe>
  void select(const lt::Handle* handle, int attribute, int value, Describe&& where) {
    lt::check(lt::api().cusparseLtMatmulAlgSetAttribute(handle, selection.get(), attribute, &value,
                                                        sizeof value),
              "cusparseLtMatmulAlgSetAttribute", [&] {
                return where() + " (attribute " + std::to_string(attribute) + " = " +
                       std::to_string(value) + ")";
              });
  }
};

struct Plan {
  Setup setup;
  OwnedPlan plan;  // goes before what it refers to
  std::size_t workspace_bytes = 0, weight_bytes = 0;
  const void* bias;  // that the descriptor holds

  Plan(const lt::Handle* handle, const Problem& p, std::int64_t m, const void* first_bias)
      : setup(handle, p, m, first_bias), bias(first_bias) {
    const lt::Api& library = lt::api();
    const auto where = [&] { return describe(p, m); };
    plan.make(
        "cusparseLtMatmulPlanInit",
        [&](lt::MatmulPlan* object) {
          return library.cusparseLtMatmulPlanInit(handle, object, &setup.matmul,
                                                  setup.selection.get());
        },
        where);
    lt::check(library.cusparseLtMatmulGetWorkspace(handle, plan.get(), &workspace_bytes),
              "cusparseLtMatmulGetWorkspace", where);
    std::size_t scratch_bytes = 0;
    lt::check(library.cusparseLtSpMMACompressedSize2(handle, setup.w.get(), &weight_bytes,
                                                     &scratch_bytes),
              "cusparseLtSpMMACompressedSize2", where);
  }
};

struct PlanKey {
  Problem problem;
  std::int64_t m;
  const void* bias;  // null where one plan serves every bias

  bool operator==(const PlanKey& other) const {
    return problem == other.problem && m == other.m && bias == other.bias;
  }
};

struct PlanHash {
  std::size_t operator()(const PlanKey& key) const {
    const Problem& p = key.problem;
    std::size_t hash = std::hash<const void*>()(key.bias);
    for (const std::int64_t part :
         {key.m, p.n, p.k, static_cast<std::int64_t>(p.type), std::int64_t{p.algorithm},
          std::int64_t{p.split_k}, std::int64_t{p.split_k_mode}, std::int64_t{p.has_bias},
          std::int64_t{p.is_bias_late}}) {
      hash = (hash ^ static_cast<std::size_t>(part)) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

// The library's handle and the plans of one thread on one device.
struct Context {
  OwnedHandle handle;
  std::unordered_map<PlanKey, std::unique_ptr<Plan>, PlanHash> plans;  // go before the handle

  explicit Context(int device) {
    handle.make(
        "cusparseLtInit", [](lt::Handle* object) { return lt::api().cusparseLtInit(object); },
        [&] { return "cuda:" + std::to_string(device); });
  }
};

// The handle belongs to the device that is current when it is made.
void check_device(int device) {
  int current = -1;
  check_driver(driver().get_device(&current), "cuCtxGetDevice");
  if (current != device) {
    throw std::runtime_error("the tensors are on cuda:" + std::to_string(device) +
                             ", but the current device is cuda:" + std::to_string(current));
  }
}

Context& context(int device) {
  thread_local std::unordered_map<int, std::unique_ptr<Context>> contexts;
  std::unique_ptr<Context>& found = contexts[device];
  if (!found) {
    check_device(device);
    const RelaxedCapture relaxed;
    found = std::make_unique<Context>(device);
  }
  return *found;
}

Plan& make_plan(Context& here, const PlanKey& key, const void* bias) {
  check_device(key.problem.device);
  const RelaxedCapture relaxed;
  if (here.plans.size() >= kMaxPlans) here.plans.clear();
  auto made = std::make_unique<Plan>(here.handle.get(), key.problem, key.m, bias);
  return *here.plans.emplace(key, std::move(made)).first->second;
}

}  // namespace

bool Problem::operator==(const Problem& other) const {
  const auto all = [](const Problem& p) {
    return std::tie(p.device, p.type, p.n, p.k, p.has_bias, p.algorithm, p.split_k, p.split_k_mode,
                    p.is_bias_late);
  };
  return all(*this) == all(other);
}

std::size_t sparse_linear(const Problem& problem, const Operands& o) {
  Context& here = context(problem.device);
  const PlanKey key{problem, o.m, problem.is_bias_late ? nullptr : o.bias};
  const auto found = here.plans.find(key);
  Plan& plan = found == here.plans.end() ? make_plan(here, key, o.bias) : *found->second;
  const auto where = [&] { return describe(problem, o.m); };
  if (o.weight_bytes != plan.weight_bytes) {
    throw std::runtime_error("the compressed weight has " + std::to_string(o.weight_bytes) +
                             " bytes, cuSPARSELt needs " + std::to_string(plan.weight_bytes) +
                             " for " + where());
  }
  if (o.workspace_bytes < plan.workspace_bytes) return plan.workspace_bytes;
  const lt::Handle* handle = here.handle.get();
  if (plan.bias != o.bias) {
    plan.setup.set_bias(handle, o.bias, where);
    plan.bias = o.bias;
  }
  const float alpha = 1.0f, beta = 0.0f;
  void* stream = o.stream;
  lt::check(lt::api().cusparseLtMatmul(handle, plan.plan.get(), &alpha, o.weight, o.x, &beta, o.out,
                                       o.out, o.workspace, &stream, 1),
            "cusparseLtMatmul", where);
  return 0;
}

int count_algorithms(const Problem& problem, std::int64_t m, const void* bias) {
  Context& here = context(problem.device);
  const lt::Handle* handle = here.handle.get();
  Setup setup(handle, problem, m, bias);
  int count = 0;
  lt::check(lt::api().cusparseLtMatmulAlgGetAttribute(handle, setup.selection.get(),
                                                      lt::kAlgorithmMaxId, &count, sizeof count),
            "cusparseLtMatmulAlgGetAttribute(max id)", [&] { return describe(problem, m); });
  return count;
}

std::pair<std::size_t, std::size_t> compressed_size(int device, ValueType type, std::int64_t n,
                                                    std::int64_t k) {
  const lt::Handle* handle = context(device).handle.get();
  OwnedMatrix weight;
  make_weight(handle, weight, device, type, n, k);
  std::size_t size = 0, scratch = 0;
  lt::check(lt::api().cusparseLtSpMMACompressedSize2(handle, weight.get(), &size, &scratch),
            "cusparseLtSpMMACompressedSize2", [&] { return describe_weight(device, type, n, k); });
  return {size, scratch};
}

void compress_2to4(int device, ValueType type, std::int64_t n, std::int64_t k, const void* w,
                   void* compressed, void* scratch, void* stream) {
  const lt::Handle* handle = context(device).handle.get();
  OwnedMatrix weight;
  make_weight(handle, weight, device, type, n, k);
  lt::check(lt::api().cusparseLtSpMMACompress2(handle, weight.get(), 1, lt::kTranspose, w,
                                               compressed, scratch, stream),
            "cusparseLtSpMMACompress2", [&] { return describe_weight(device, type, n, k); });
}

}  // namespace proxsparse
