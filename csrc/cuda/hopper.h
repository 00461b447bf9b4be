// Hopper's instructions that CUDA C++ has no name for, one function each: barriers in shared
// memory, tiles copied by the tensor memory accelerator, products of a warpgroup.
// tests/emulator/hopper.h gives the same functions to the CPU.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "ptx.h"

namespace proxsparse {

// Rows of 128 bytes, 8 of them an atom in which 16-byte pieces are exchanged against bank
// conflicts: as a copied tile lies in shared memory, and as products read it.
constexpr int kTileRowBytes = 128, kTileAlignment = 1024;

using TileMap = CUtensorMap;

// Describes a matrix [rows, columns] of 16-bit elements in device memory, of which tiles of
// `tile_rows` rows and 64 columns are copied; what lies outside it is copied as zeros. The driver's
// function is looked up, because the extension is not linked against the driver. Null, or what is
// wrong.
inline const char* describe_tiles(TileMap* map, const void* data, std::int64_t rows,
                                  std::int64_t columns, std::int64_t row_stride, int tile_rows,
                                  bool is_bfloat16) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &found);
    return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * row_stride)};
  const cuuint32_t box[] = {kTileRowBytes / 2, static_cast<cuuint32_t>(tile_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(map, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refuses the operands";
}

// Counts arrivals and bytes; a phase ends when those announced are there.
using Barrier = std::uint64_t;

__device__ __forceinline__ void make_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// After the last `make_barrier`, before copies may use them.
__device__ __forceinline__ void show_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// One arrival, and `bytes` that copies will bring.
__device__ __forceinline__ void arrive_and_expect(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Until the phase of this parity has ended; the first has parity 0.
__device__ __forceinline__ void wait_for_phase(Barrier* barrier, unsigned parity) {
  unsigned is_over = 0;
  while (!is_over) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(is_over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// The tile whose first element is at (row, column); its bytes count for the barrier.
__device__ __forceinline__ void copy_tile(void* to, const TileMap& map, int row, int column,
                                          Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// Bytes that lie together, a multiple of 16; they count for the barrier.
__device__ __forceinline__ void copy_bytes(void* to, const void* from, int bytes,
                                           Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Before the first product that uses registers which other instructions wrote.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending of the committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The register stays the value's up to here: products read their metadata at any time until they
// are waited for, of which the compiler knows nothing.
__device__ __forceinline__ void keep(std::uint32_t value) { asm volatile("" ::"r"(value)); }

// Names a tile to a product: where it is, 1024 bytes from one atom of 8 rows to the next, and that
// its pieces are exchanged.
__device__ __forceinline__ std::uint64_t tile_descriptor(const void* tile) {
  return (shared_address(tile) & 0x3ffff) >> 4 | std::uint64_t{1} << 16 |
         std::uint64_t{kTileAlignment >> 4} << 32 | std::uint64_t{1} << 62;
}

#define PROXSPARSE_WGMMA(TOKENS, TYPE, SUMS, ...)                            \
  asm volatile(                                                              \
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, 1, 0;\n"                       \
      "wgmma.mma_async.sp.sync.aligned.m64n" TOKENS "k32.f32." TYPE " " SUMS \
      ", adds, 1, 1, 0, 0;\n}"                                               \
      : __VA_ARGS__                                                          \
      : "l"(tile_descriptor(w)), "l"(tile_descriptor(x)), "r"(metadata), "n"(kSelector))
#define PROXSPARSE_SUMS4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define PROXSPARSE_SUMS16(i) \
  PROXSPARSE_SUMS4(i), PROXSPARSE_SUMS4(i + 4), PROXSPARSE_SUMS4(i + 8), PROXSPARSE_SUMS4(i + 12)
#define PROXSPARSE_PRODUCT(TYPE)                                                                \
  if constexpr (kTokens == 8) {                                                                 \
    PROXSPARSE_WGMMA("8", TYPE, "{%0, %1, %2, %3}, %4, %5, %6, %7", PROXSPARSE_SUMS4(0));       \
  } else if constexpr (kTokens == 16) {                                                         \
    PROXSPARSE_WGMMA("16", TYPE, "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, %10, %11",          \
                     PROXSPARSE_SUMS4(0), PROXSPARSE_SUMS4(4));                                 \
  } else if constexpr (kTokens == 32) {                                                         \
    PROXSPARSE_WGMMA("32", TYPE,                                                                \
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, " \
                     "%16, %17, %18, %19",                                                      \
                     PROXSPARSE_SUMS16(0));                                                     \
  } else if constexpr (kTokens == 64) {                                                         \
    PROXSPARSE_WGMMA("64", TYPE,                                                                \
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "  \
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "   \
                     "%30, %31}, %32, %33, %34, %35",                                           \
                     PROXSPARSE_SUMS16(0), PROXSPARSE_SUMS16(16));                              \
  } else {                                                                                      \
    PROXSPARSE_WGMMA("128", TYPE,                                                               \
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "            \
                     "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "   \
                     "%28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "   \
                     "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "   \
                     "%56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, %66, %67",             \
                     PROXSPARSE_SUMS16(0), PROXSPARSE_SUMS16(16), PROXSPARSE_SUMS16(32),        \
                     PROXSPARSE_SUMS16(48));                                                    \
  }

// Begins sum[64 rows, kTokens] += w[64, 32] x[32, kTokens] with a 2:4 w, of which the 16 kept
// columns and their positions are given; all 128 threads of a warpgroup together. Neither operand
// nor sum may be touched before `wait_for_products`.
template <typename T, int kTokens, int kSelector>
__device__ __forceinline__ void multiply_add_2to4(float (&sum)[kTokens / 2], const void* w,
                                                  const void* x, std::uint32_t metadata) {
  static_assert(kTokens == 8 || kTokens == 16 || kTokens == 32 || kTokens == 64 || kTokens == 128);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    PROXSPARSE_PRODUCT("bf16.bf16")
  } else {
    PROXSPARSE_PRODUCT("f16.f16")
  }
}

#undef PROXSPARSE_PRODUCT
#undef PROXSPARSE_SUMS16
#undef PROXSPARSE_SUMS4
#undef PROXSPARSE_WGMMA

}  // namespace proxsparse
