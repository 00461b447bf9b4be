// The product with a 2:4 weight by cuSPARSELt: D = x W^T + bias.
//
// In memory W [N, K], x [M, K] and D [M, N] are row-major. To the library, which takes them as
// column-major, W is the transposed structured operand A, x the dense operand B and D comes out
// [N, M]: one and the same bytes, so nothing is transposed or copied, and the bias, one entry per
// row of the library's D, is one per output feature.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace proxsparse {

// What the operands hold; `cusparselt_product.cpp` has a row for each with what the library needs
// to know. A row for a type with a scale per output feature would also set the alpha vector.
enum class ValueType : int { kBFloat16 = 0, kFloat16 = 1 };

constexpr int kLibraryChoice = -1;  // an algorithm: the library's own default

// One weight shape and how to multiply with it. The token count is an argument of the call.
struct Problem {
  int device;
  ValueType type;
  std::int64_t n, k;
  bool has_bias;
  int algorithm;     // id, or kLibraryChoice
  int split_k;       // 1: none; -1: the library's segment-K on sm_90
  int split_k_mode;  // cusparseLtSplitKMode_t; 0 leaves the library's
  // Whether one plan serves every bias of this shape, its pointer being set before each launch. It
  // holds if the library reads the pointer at launch; if not, each bias gets a plan of its own.
  bool is_bias_late;

  bool operator==(const Problem& other) const;
};

struct Operands {
  std::int64_t m;  // a multiple of 8
  const void* weight;
  std::size_t weight_bytes;
  const void* x;
  const void* bias;  // null without one
  void* out;
  void* workspace;
  std::size_t workspace_bytes;
  void* stream;
};

// Launches the product on the stream and returns 0; or, when the workspace is too small, launches
// nothing and returns the bytes needed. The current CUDA device must be the problem's. Plans are
// made at the first call of each thread with a problem and token count, which takes a while, and
// kept; the launch allocates nothing and does not wait, so it can be captured in a graph.
std::size_t sparse_linear(const Problem& problem, const Operands& operands);

// How many algorithm ids the library has for this problem and token count.
int count_algorithms(const Problem& problem, std::int64_t m, const void* bias);

// Bytes of the compressed weight, and of the scratch that compress_2to4 needs.
std::pair<std::size_t, std::size_t> compressed_size(int device, ValueType type, std::int64_t n,
                                                    std::int64_t k);

// Writes the compressed form of the dense W [N, K], which must be 2:4 (the library does not check),
// on the stream.
void compress_2to4(int device, ValueType type, std::int64_t n, std::int64_t k, const void* w,
                   void* compressed, void* scratch, void* stream);

}  // namespace proxsparse
