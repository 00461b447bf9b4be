// The part of CUDA's runtime that the kernels use, on the emulator.
#pragma once

#include <cmath>
#include <tuple>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

#define threadIdx (emulator::Dim(emulator::current->thread))
#define blockIdx (emulator::Dim(emulator::current->block->index))

inline void __syncthreads() { emulator::wait_at(emulator::current->block->barrier); }
inline void __syncwarp() { emulator::wait_at(emulator::current->warp->barrier); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }

struct uint2 {
  std::uint32_t x, y;
};
struct float4 {
  float x, y, z, w;
};
// Byte i of the result is the one of (low, high), of 8 bytes, that nibble i of the selector names.
inline std::uint32_t __byte_perm(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
  const std::uint64_t bytes = low | static_cast<std::uint64_t>(high) << 32;
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const auto byte = static_cast<std::uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 255);
    result |= byte << (8 * i);
  }
  return result;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "the threads wait for each other";
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor
};
inline cudaError_t cudaGetDevice(int* index) {
  *index = emulator::settings.device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulator::Settings& s = emulator::settings;
  *value = attribute == cudaDevAttrMultiProcessorCount            ? s.multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? s.shared_bytes
                                                                  : s.major;
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= emulator::settings.shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  emulator::Dim gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      cluster = config->attrs[i].val.clusterDim.x;
    }
  }
  if (config->gridDim.x % cluster) return cudaErrorInvalidValue;
  const bool ended = emulator::run_grid(config->gridDim.x, config->blockDim.x, cluster,
                                        config->dynamicSmemBytes, [=] { kernel(arguments...); });
  return ended ? cudaSuccess : cudaErrorLaunchFailure;
}
