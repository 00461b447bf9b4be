// cuSPARSELt, loaded at run time: no NVIDIA header and no library is needed to build.
//
// The values and signatures below are those of the headers of cuSPARSELt 0.8.1 and 0.10.0, which
// agree on them; tests/test_backend_cuda.py compares them with an installed header. Only what
// this package calls is declared.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace proxsparse::cusparselt {

using Status = int;  // cusparseStatus_t; 0 is success
constexpr Status kSuccess = 0;

constexpr int kMajorVersion = 0, kMinorVersion = 1, kPatchLevel = 2;  // libraryPropertyType
constexpr int kReal16F = 2, kReal16BF = 14;                           // cudaDataType
constexpr int kCompute32F = 2;                                        // cusparseComputeType
constexpr int kNonTranspose = 0, kTranspose = 1;                      // cusparseOperation_t
constexpr int kColumnMajor = 1;                                       // cusparseOrder_t
constexpr int kSparsity50Percent = 0;                                 // cusparseLtSparsity_t
constexpr int kBiasPointer = 8;       // cusparseLtMatmulDescAttribute_t
constexpr int kAlgorithmDefault = 0;  // cusparseLtMatmulAlg_t
constexpr int kAlgorithmId = 0;       // cusparseLtMatmulAlgAttribute_t, and the next three
constexpr int kAlgorithmMaxId = 1;
constexpr int kSplitK = 3;
constexpr int kSplitKMode = 4;

// The library's objects are opaque. They may hold pointers to one another, so they never move while
// in use.
struct alignas(16) Opaque {
  std::uint8_t data[512];
};
struct Handle : Opaque {};
struct MatDescriptor : Opaque {};
struct MatmulDescriptor : Opaque {};
struct AlgSelection : Opaque {};
struct MatmulPlan : Opaque {};

// The functions used, as X(name, arguments after a return type of Status).
#define PROXSPARSE_CUSPARSELT_FUNCTIONS(X)                                                        \
  X(cusparseLtInit, (Handle*))                                                                    \
  X(cusparseLtDestroy, (const Handle*))                                                           \
  X(cusparseLtDenseDescriptorInit,                                                                \
    (const Handle*, MatDescriptor*, std::int64_t rows, std::int64_t columns, std::int64_t stride, \
     std::uint32_t alignment, int value_type, int order))                                         \
  X(cusparseLtStructuredDescriptorInit,                                                           \
    (const Handle*, MatDescriptor*, std::int64_t rows, std::int64_t columns, std::int64_t stride, \
     std::uint32_t alignment, int value_type, int order, int sparsity))                           \
  X(cusparseLtMatDescriptorDestroy, (const MatDescriptor*))                                       \
  X(cusparseLtMatmulDescriptorInit,                                                               \
    (const Handle*, MatmulDescriptor*, int operation_a, int operation_b, const MatDescriptor* a,  \
     const MatDescriptor* b, const MatDescriptor* c, const MatDescriptor* d, int compute))        \
  X(cusparseLtMatmulDescSetAttribute,                                                             \
    (const Handle*, MatmulDescriptor*, int attribute, const void*, std::size_t))                  \
  X(cusparseLtMatmulAlgSelectionInit,                                                             \
    (const Handle*, AlgSelection*, const MatmulDescriptor*, int algorithm))                       \
  X(cusparseLtMatmulAlgSelectionDestroy, (const AlgSelection*))                                   \
  X(cusparseLtMatmulAlgSetAttribute,                                                              \
    (const Handle*, AlgSelection*, int attribute, const void*, std::size_t))                      \
  X(cusparseLtMatmulAlgGetAttribute,                                                              \
    (const Handle*, const AlgSelection*, int attribute, void*, std::size_t))                      \
  X(cusparseLtMatmulPlanInit,                                                                     \
    (const Handle*, MatmulPlan*, const MatmulDescriptor*, const AlgSelection*))                   \
  X(cusparseLtMatmulPlanDestroy, (const MatmulPlan*))                                             \
  X(cusparseLtMatmulGetWorkspace, (const Handle*, const MatmulPlan*, std::size_t*))               \
  X(cusparseLtMatmul, (const Handle*, const MatmulPlan*, const void* alpha, const void* a,        \
                       const void* b, const void* beta, const void* c, void* d, void* workspace,  \
                       void** streams, std::int32_t num_streams))                                 \
  X(cusparseLtSpMMACompressedSize2,                                                               \
    (const Handle*, const MatDescriptor*, std::size_t* size, std::size_t* buffer_size))           \
  X(cusparseLtSpMMACompress2,                                                                     \
    (const Handle*, const MatDescriptor*, int is_sparse_a, int operation, const void* dense,      \
     void* compressed, void* buffer, void* stream))

struct Api {
  std::string path;
  int version[3];  // as cusparseLtGetProperty has it; the encoding of GetVersion changed in 0.10
#define PROXSPARSE_MEMBER(name, arguments) Status(*name) arguments;
  PROXSPARSE_CUSPARSELT_FUNCTIONS(PROXSPARSE_MEMBER)
#undef PROXSPARSE_MEMBER
  const char* (*cusparseLtGetErrorName)(Status);
  const char* (*cusparseLtGetErrorString)(Status);
};

// A call that cuSPARSELt refused: its own text, the call and the shapes.
class LibraryError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Loads the library once per process; `path` is absolute, or a bare name for the system's loader.
// A second call with the same path does nothing. Throws std::runtime_error with the loader's text,
// the missing function, or the version when it is older than 0.8.0.
const Api& load(const std::string& path);

// The library, once loaded; throws std::runtime_error before.
const Api& api();

// Throws LibraryError unless the status is success. `where` describes the operands and is called
// only then.
template <class Describe>
void check(Status status, const char* call, Describe&& where) {
  if (status == kSuccess) return;
  const Api& library = api();
  throw LibraryError(std::string(call) + " failed with " + library.cusparseLtGetErrorName(status) +
                     " (" + library.cusparseLtGetErrorString(status) + ") for " + where());
}

}  // namespace proxsparse::cusparselt
