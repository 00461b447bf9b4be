// The instructions that CUDA C++ has no name for, one function each. tests/emulator/ptx.h gives the
// same functions to the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace proxsparse {

constexpr int kPiece = 16;  // bytes of an asynchronous copy, and of a row of ldmatrix

__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// The thread's place in its warp, read anew: what `threadIdx` gives, the compiler may keep in local
// memory across a change of the number of registers, and load in each round of a loop.
__device__ __forceinline__ int lane_index() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// The warp's place in its block, known to be the same for all its threads: what follows from it is
// computed once for a warp.
__device__ __forceinline__ int warp_index() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

// No cache hints: of those, ptxas 13.0 makes instructions for sm_90a that a GPU calls illegal (the
// descriptor they name is never loaded).
__device__ __forceinline__ void copy_weight(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(shared_address(to)),
               "l"(from)
               : "memory");
}

// 16 bytes, or zeros where the token does not exist.
__device__ __forceinline__ void copy_tokens(void* to, const void* from, bool exists) {
  const int bytes = exists ? kPiece : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void load_matrices(std::uint32_t (&fragment)[4], const void* piece) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(piece))
               : "memory");
}

#define PROXSPARSE_MMA(TYPE)                                                                  \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE             \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "                \
               "{%0, %1, %2, %3}, %12, %13;"                                                  \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                       \
               : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x[0]), "r"(x[1]), "r"(x[2]), \
                 "r"(x[3]), "r"(metadata), "n"(kSelector))

// sum[16 rows, 8 tokens] += w[16, 32] x[32, 8] with a 2:4 w, of which the 16 kept columns and their
// positions are given.
template <int kSelector, typename T>
__device__ __forceinline__ void multiply_add_2to4(float (&sum)[4], const std::uint32_t (&w)[4],
                                                  const std::uint32_t (&x)[4],
                                                  std::uint32_t metadata) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    PROXSPARSE_MMA("bf16.bf16");
  } else {
    PROXSPARSE_MMA("f16.f16");
  }
}

#undef PROXSPARSE_MMA

// After the thread's warp has written and met, that all of it is there: to the one thread, maybe of
// another block, that waits for it.
__device__ __forceinline__ void send_signal(int* signal) {
  __threadfence();
  asm volatile("st.relaxed.gpu.global.b32 [%0], 1;" ::"l"(signal) : "memory");
}

// And sets it back.
__device__ __forceinline__ void wait_for_signal(int* signal) {
  int value = 0;
  while (value == 0) {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(signal) : "memory");
  }
  asm volatile("st.relaxed.gpu.global.b32 [%0], 0;" ::"l"(signal) : "memory");
}

// What another block wrote before its signal: not from a cache that may be older.
__device__ __forceinline__ float4 load_signalled(const float4* from) { return __ldcg(from); }

// Lets the next kernel of the stream start as soon as there is room for it, if it was launched to.
__device__ __forceinline__ void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel before is done and what it wrote is visible.
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// All threads of all blocks of the cluster arrive before any goes on; shared memory is visible.
__device__ __forceinline__ void synchronize_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}

// The float at the address that `mine` has in this block, in the memory of block `rank` of the
// cluster.
__device__ __forceinline__ float read_shared_of(int rank, const float* mine) {
  float value = 0.0f;
#if __CUDA_ARCH__ >= 900
  std::uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(mine)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
#endif
  return value;
}

}  // namespace proxsparse
