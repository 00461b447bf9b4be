// What the kernels that read packed weights share: the form of the weight, the last sums of
// sparse_linear_decode, the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "ptx.h"
#include "sparse_linear_decode.h"

namespace proxsparse {

constexpr int kStep = 64;  // columns between two changes of the metadata register
constexpr int kCodeRows = 64, kCodeColumns = 32, kCodeTile = 256;  // a tile of codes and its bytes
constexpr int kMaxDevices = 64;

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

// Where in the codes of 64 rows a thread finds its 8 bytes, of rows r and r + 8 and the 32 columns
// that its half of a quad cares for in this step; r is of the warp's 16 rows the thread's own.
// Pieces of 16 bytes: 16 a tile, of them four to 16 rows; two rows share a piece.
struct CodePlace {
  int piece, offset;
};
__device__ __forceinline__ CodePlace code_place(int step, int sixteenth, int lane) {
  const int row = lane / 4;
  return {(step * 2 + lane % 4 / 2) * 16 + sixteenth * 4 + row / 2, row % 2 * 8};
}

// The metadata of a thread from these bytes: byte 2g + i has group g + 4i of row r in its low half,
// of row r + 8 in its high one. Wanted are the four groups of one i, those of row r first.
__device__ __forceinline__ std::uint32_t metadata_of(const unsigned char* codes, int i) {
  const uint2 bytes = *reinterpret_cast<const uint2*>(codes);
  const std::uint32_t both = __byte_perm(bytes.x, bytes.y, i == 0 ? 0x6420 : 0x7531);
  const std::uint32_t low = both & 0x0f0f0f0f, high = both >> 4 & 0x0f0f0f0f;
  return __byte_perm(low | low >> 4, high | high >> 4, 0x6420);
}

// Where in a ring of chunks a chunk is, and the parity of its turn.
struct Turn {
  int stage = 0;
  unsigned parity = 0;

  __device__ void advance(int by, int stages) {
    stage += by;
    if (stage >= stages) {
      stage -= stages;
      parity ^= 1;
    }
  }
};

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// Adds the partial sums of a block's column groups, and of the blocks of its cluster, in a fixed
// order, and stores the results, times the scales of row and token where there are any; all threads
// together.
template <typename T, int kRows, int kTokens, int kGroups, int kSumStride, int kThreads>
__device__ __forceinline__ void store_sums(float* partial, const T* bias, T* y, int M, int N,
                                           int first_row, int part, int splits,
                                           const float* row_scales = nullptr,
                                           const float* token_scales = nullptr) {
  constexpr int kPairs = kRows / 2;
  const int thread = threadIdx.x;
  const auto store = [&](int m, int row, float first, float second) {
    const int n = first_row + row;
    if (n >= N) return;
    const bool has_second = n + 1 < N;
    if (row_scales != nullptr) {
      first *= token_scales[m] * row_scales[n];
      if (has_second) second *= token_scales[m] * row_scales[n + 1];
    }
    if (bias != nullptr) first += to_float(bias[n]);
    if (bias != nullptr && has_second) second += to_float(bias[n + 1]);
    T* to = y + static_cast<std::int64_t>(m) * N + n;
    if (N % 2 == 0) {
      *reinterpret_cast<Pair<T>*>(to) = {from_float<T>(first), from_float<T>(second)};
    } else {
      to[0] = from_float<T>(first);
      if (has_second) to[1] = from_float<T>(second);
    }
  };
  const auto add_groups = [&](int m, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      sum += partial[(group * kTokens + m) * kSumStride + row];
    }
    return sum;
  };
  if (splits == 1) {
    for (int i = thread; i < M * kPairs; i += kThreads) {
      const int m = i / kPairs, row = i % kPairs * 2;
      store(m, row, add_groups(m, row), add_groups(m, row + 1));
    }
    return;
  }
  if (kGroups > 1) {
    for (int i = thread; i < M * kRows; i += kThreads) {
      const int m = i / kRows, row = i % kRows;
      partial[m * kSumStride + row] = add_groups(m, row);
    }
  }
  synchronize_cluster();
  for (int i = part * kThreads + thread; i < M * kPairs; i += splits * kThreads) {
    const int m = i / kPairs, row = i % kPairs * 2;
    float first = 0.0f, second = 0.0f;
    for (int q = 0; q < splits; ++q) {
      first += read_shared_of(q, partial + m * kSumStride + row);
      second += read_shared_of(q, partial + m * kSumStride + row + 1);
    }
    store(m, row, first, second);
  }
  synchronize_cluster();  // a block's memory must outlive the reads of the others
}

struct Device {
  int multiprocessors = 0, shared_bytes = 0, major = 0;
};

// What the current device has, asked once; null if it cannot be asked.
inline const Device* current_device(int& index) {
  static Device devices[kMaxDevices];
  static std::atomic<bool> known[kMaxDevices];
  if (cudaGetDevice(&index) != cudaSuccess || index >= kMaxDevices) return nullptr;
  if (!known[index].load(std::memory_order_acquire)) {
    Device device;
    if (cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index) ||
        cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                               index) ||
        cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index)) {
      return nullptr;
    }
    devices[index] = device;  // two threads may both get here: they write the same
    known[index].store(true, std::memory_order_release);
  }
  return &devices[index];
}

// `sparse_linear_decode` on the current device, which is a Hopper GPU.
const char* sparse_linear_decode_hopper(const DecodeCall& call, int index, const Device& device);

// Queues a kernel of the shape S on so many blocks, of which each `cluster` are one.
template <typename S, typename Call, typename... Parameters, typename... Arguments>
const char* launch_kernel(void (*kernel)(Parameters...), const Call& call, const Device& device,
                          int index, int blocks, int cluster, int threads, int shared_bytes,
                          Arguments... arguments) {
  static std::atomic<std::uint64_t> allowed{0};  // devices on which the kernel may use its memory
  const std::uint64_t bit = std::uint64_t{1} << index;
  if ((allowed.load(std::memory_order_relaxed) & bit) == 0) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kMostSharedBytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    allowed.fetch_or(bit, std::memory_order_relaxed);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(call.stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (call.may_start_early && device.major >= 9) {
    cudaLaunchAttribute& early_start = attributes[config.numAttrs++];
    early_start.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early_start.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& together = attributes[config.numAttrs++];
    together.id = cudaLaunchAttributeClusterDimension;
    together.val.clusterDim.x = cluster;
    together.val.clusterDim.y = together.val.clusterDim.z = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace proxsparse
