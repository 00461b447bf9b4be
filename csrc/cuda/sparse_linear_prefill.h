// The product with a packed 2:4 weight for many tokens, on Hopper; see
// sparse_linear_prefill_hopper.cu.
#pragma once

#include <cstddef>
#include <cstdint>

namespace proxsparse {

// How a call is laid out on the GPU; zeros let the library choose.
struct PrefillLayout {
  int rows = 0;     // of the weight per tile: 128, or with 192 tokens 256
  int tokens = 0;   // per tile: 64, 96, 128, 160, 192 or 256
  int cluster = 0;  // blocks that share their tokens: 1 or 2
};

// y[M, N] = x[M, K] W[N, K]^T + bias. All pointers are device memory, but for bias and scales
// 16-byte aligned; the rows of x are x_stride elements apart. In FP8 x and W are numbers of 8 bits
// (e4m3), and y = x W^T * token_scales[M] * row_scales[N] + bias.
struct PrefillCall {
  const void* x;
  const void* values;  // [N, K/2]
  // uint8 [ceil(N/64), K/32, 256], from `reference.tile_codes`; in FP8 [ceil(N/64), K/64, 512],
  // from `reference.tile_codes_8_bit`.
  const void* codes;
  const void* bias;  // [N], or null
  void* y;
  int tokens, in_features, out_features;  // M, K a multiple of 64 (FP8: 128), N a multiple of 8
  std::int64_t x_stride;
  bool is_bfloat16;  // y and bias, and but for FP8 x and W; else float16
  PrefillLayout layout;
  // Whether the weight was complete before the kernel that is queued ahead of this one began: then
  // it may be read while that one ends.
  bool may_start_early;
  // Used by no other launch that may run at the same time. Signals are zeros, and are again when
  // the kernel ends, 8 for each multiprocessor; without them blocks cannot share a tile.
  void* workspace;
  std::size_t workspace_bytes;
  int* signals;
  void* stream;
  bool is_fp8 = false;
  const float* token_scales = nullptr;  // [M]
  const float* row_scales = nullptr;    // [N]
};

// Queues the product on the stream of the current device. Returns null, or what is wrong. Where the
// workspace is too small, nothing is queued, and `needed_bytes` is not zero.
const char* sparse_linear_prefill(const PrefillCall& call, std::size_t& needed_bytes);

}  // namespace proxsparse
