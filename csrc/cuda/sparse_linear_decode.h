// The product with a packed 2:4 weight for few tokens; see sparse_linear_decode.cu.
#pragma once

#include <cstdint>

namespace proxsparse {

constexpr int kMaxDecodeTokens = 64, kMaxHopperTokens = 256;
constexpr int kMaxDecodeWeights = 4;  // that one call multiplies with

// How a call is laid out on the GPU; zeros let the library choose. Where a block has too little
// shared memory for rows and depth, they give way to the next smaller ones; splits stay.
struct DecodeLayout {
  int rows = 0;    // of the weight per block: 64, 128 or 256
  int depth = 0;   // chunks under way per block: 1 few (several blocks a multiprocessor), 2 many
  int splits = 0;  // blocks that share the columns of a tile, as one cluster: 1, 2, 4 or 8
};

// A weight W [N, K] and where its product goes.
struct DecodeWeight {
  const void* values;  // [N, K/2]
  // uint8 [ceil(N/64), K/32, 256], from `reference.tile_codes`; in FP8 [ceil(N/64), K/64, 512],
  // from `reference.tile_codes_8_bit`.
  const void* codes;
  const void* bias;                   // [N], or null
  void* y;                            // [M, N], contiguous
  int out_features;                   // N
  const float* row_scales = nullptr;  // [N], in FP8
};

// y[M, N] = x[M, K] W[N, K]^T + bias, for weights that are multiplied with the same x. All pointers
// are device memory, and but for bias and scales 16-byte aligned; the rows of x are x_stride
// elements apart. In FP8, on Hopper, x and W are numbers of 8 bits (e4m3), and y = x W^T *
// token_scales[M] * row_scales[N] + bias; K is then a multiple of 128.
struct DecodeCall {
  const void* x;
  const DecodeWeight* weights;
  int num_weights, tokens, in_features;
  std::int64_t x_stride;
  bool is_bfloat16;  // y and bias, and but for FP8 x and W; else float16
  DecodeLayout layout;
  // Whether the weights were complete before the kernel that is queued ahead of this one began:
  // then they may be read while that one ends.
  bool may_start_early;
  void* stream;
  bool is_fp8 = false;
  const float* token_scales = nullptr;  // [M]
};

// Queues the products on the stream of the current device. Returns null, or what is wrong.
const char* sparse_linear_decode(const DecodeCall& call);

}  // namespace proxsparse
