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
// conflicts: as a copied tile lies in shared memory, and as products read it. Or, where that is
// said, rows of 64 bytes, in whose atoms four pieces are.
constexpr int kTileRowBytes = 128, kTileAlignment = 1024;

using TileMap = CUtensorMap;

// Describes a matrix [rows, columns] of 16-bit elements in device memory, of which tiles of
// `tile_rows` rows of `row_bytes` are copied; what lies outside it is read as zeros, and not
// written. The driver's function is looked up, because the extension is not linked against the
// driver. Null, or what is wrong.
inline const char* describe_tiles(TileMap* map, const void* data, std::int64_t rows,
                                  std::int64_t columns, std::int64_t row_stride, int tile_rows,
                                  bool is_bfloat16, int row_bytes = kTileRowBytes) {
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
  const cuuint32_t box[] = {static_cast<cuuint32_t>(row_bytes / 2),
                            static_cast<cuuint32_t>(tile_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(map, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             row_bytes == kTileRowBytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
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

// `count` times, at the barrier that block `rank` of the cluster has where this one has `barrier`.
__device__ __forceinline__ void arrive_at(int rank, Barrier* barrier, int count = 1) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there], %2;\n}" ::"r"(shared_address(barrier)),
      "r"(rank), "r"(count)
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

// The same, to this place in the memory of all blocks of the cluster whose bits are set; at each,
// the barrier there counts its bytes.
__device__ __forceinline__ void copy_tile_to_cluster(void* to, const TileMap& map, int row,
                                                     int column, Barrier* barrier,
                                                     std::uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
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

// The tile whose first element is at (row, column), to device memory, in the thread's open group.
__device__ __forceinline__ void store_tile(const TileMap& map, int row, int column,
                                           const void* from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
      "r"(column), "r"(row), "r"(shared_address(from))
      : "memory");
}

__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until shared memory has been read for all but kPending of the thread's committed groups.
template <int kPending>
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// After a thread has written what a tile's store shall read, before that thread tells the one that
// asks for it.
__device__ __forceinline__ void show_to_stores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Four matrices of 8 x 8 16-bit elements, the columns of matrix j to where threads 8j to 8j + 7
// point; a thread has elements 2(t % 4) and 2(t % 4) + 1 of row t / 4 of each.
__device__ __forceinline__ void store_transposed(void* piece, const std::uint32_t (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(piece)),
               "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}

// Both rounded to T, the first in the low half.
template <typename T>
__device__ __forceinline__ std::uint32_t round_pair(float first, float second) {
  std::uint32_t pair;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
}

// All 128 threads of a warpgroup have only so many registers from now on, so that others can have
// more: a multiple of 8.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Waits until there are as many for all 128 threads.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
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

// True for one thread of the warp. All 32 ask together.
__device__ __forceinline__ bool is_elected() {
  int is;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n}"
      : "=r"(is));
  return is != 0;
}

// The register stays the value's up to here: products read their metadata at any time until they
// are waited for, of which the compiler knows nothing.
__device__ __forceinline__ void keep(std::uint32_t value) { asm volatile("" ::"r"(value)); }

// An operand of a product, a tile in shared memory or what lies a multiple of 16 bytes behind its
// beginning: the low half of the descriptor that names it, so that a sum is all that moving takes.
// A place in shared memory has 18 bits, of which it holds the upper 14.
struct Operand {
  std::uint32_t low;

  __device__ __forceinline__ Operand(const void* tile)
      : low(shared_address(tile) >> 4 | 1u << 16) {}
  __device__ __forceinline__ Operand operator+(int bytes) const {
    Operand moved = *this;
    moved.low += bytes / 16;
    return moved;
  }
};

// With how far apart atoms of 8 rows are, and that their pieces are exchanged.
template <int kRowBytes = kTileRowBytes>
__device__ __forceinline__ std::uint64_t descriptor(Operand operand) {
  constexpr std::uint64_t kSwizzle = kRowBytes == kTileRowBytes ? 1 : 2;
  return std::uint64_t{8 * kRowBytes >> 4} << 32 | kSwizzle << 62 | operand.low;
}

#define PROXSPARSE_WGMMA(TOKENS, TYPE, SIGNS, SUMS, REST, ADDS, ...)                               \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS                                      \
               ", 0;\nwgmma.mma_async.sp.sync.aligned.m64n" TOKENS TYPE " {" SUMS "}, " REST       \
               ", adds, " SIGNS ";\n}"                                                             \
               : __VA_ARGS__                                                                       \
               : "l"(descriptor<kRowBytes>(w)), "l"(descriptor(x)), "r"(metadata), "n"(kSelector), \
                 "r"(adds))
#define PROXSPARSE_TEN(tens)                                                              \
  "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens \
  "6, %" #tens "7, %" #tens "8, %" #tens "9, "
#define PROXSPARSE_SIXTY \
  PROXSPARSE_TEN()       \
  PROXSPARSE_TEN(1) PROXSPARSE_TEN(2) PROXSPARSE_TEN(3) PROXSPARSE_TEN(4) PROXSPARSE_TEN(5)
#define PROXSPARSE_SUMS4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define PROXSPARSE_SUMS16(i) \
  PROXSPARSE_SUMS4(i), PROXSPARSE_SUMS4(i + 4), PROXSPARSE_SUMS4(i + 8), PROXSPARSE_SUMS4(i + 12)
#define PROXSPARSE_SUMS64(i)                                                  \
  PROXSPARSE_SUMS16(i), PROXSPARSE_SUMS16(i + 16), PROXSPARSE_SUMS16(i + 32), \
      PROXSPARSE_SUMS16(i + 48)
#define PROXSPARSE_PRODUCT(TYPE, SIGNS)                                                                    \
  if constexpr (kTokens == 8) {                                                                            \
    PROXSPARSE_WGMMA("8", TYPE, SIGNS, "%0, %1, %2, %3", "%4, %5, %6, %7", "%8",                           \
                     PROXSPARSE_SUMS4(0));                                                                 \
  } else if constexpr (kTokens == 16) {                                                                    \
    PROXSPARSE_WGMMA("16", TYPE, SIGNS, "%0, %1, %2, %3, %4, %5, %6, %7", "%8, %9, %10, %11",              \
                     "%12", PROXSPARSE_SUMS4(0), PROXSPARSE_SUMS4(4));                                     \
  } else if constexpr (kTokens == 32) {                                                                    \
    PROXSPARSE_WGMMA("32", TYPE, SIGNS, PROXSPARSE_TEN() "%10, %11, %12, %13, %14, %15",                   \
                     "%16, %17, %18, %19", "%20", PROXSPARSE_SUMS16(0));                                   \
  } else if constexpr (kTokens == 64) {                                                                    \
    PROXSPARSE_WGMMA("64", TYPE, SIGNS,                                                                    \
                     PROXSPARSE_TEN() PROXSPARSE_TEN(1) PROXSPARSE_TEN(2) "%30, %31",                      \
                     "%32, %33, %34, %35", "%36", PROXSPARSE_SUMS16(0), PROXSPARSE_SUMS16(16));            \
  } else if constexpr (kTokens == 128) {                                                                   \
    PROXSPARSE_WGMMA("128", TYPE, SIGNS, PROXSPARSE_SIXTY "%60, %61, %62, %63",                            \
                     "%64, %65, %66, %67", "%68", PROXSPARSE_SUMS64(0));                                   \
  } else if constexpr (kTokens == 96) {                                                                    \
    PROXSPARSE_WGMMA("96", TYPE, SIGNS,                                                                    \
                     PROXSPARSE_TEN() PROXSPARSE_TEN(1) PROXSPARSE_TEN(2)                                  \
                         PROXSPARSE_TEN(3) "%40, %41, %42, %43, %44, %45, %46, %47",                       \
                     "%48, %49, %50, %51", "%52", PROXSPARSE_SUMS16(0), PROXSPARSE_SUMS16(16),             \
                     PROXSPARSE_SUMS16(32));                                                               \
  } else if constexpr (kTokens == 160) {                                                                   \
    PROXSPARSE_WGMMA("160", TYPE, SIGNS,                                                                 \
                     PROXSPARSE_SIXTY PROXSPARSE_TEN(6) "%70, %71, %72, %73, %74, %75, %76, %77, "\
                     "%78, %79", "%80, %81, %82, %83", "%84", PROXSPARSE_SUMS64(0),               \
                     PROXSPARSE_SUMS16(64)); \
  } else if constexpr (kTokens == 192) {                                                                   \
    PROXSPARSE_WGMMA("192", TYPE, SIGNS,                                                                   \
                     PROXSPARSE_SIXTY PROXSPARSE_TEN(6) PROXSPARSE_TEN(7)                                  \
                         PROXSPARSE_TEN(8) "%90, %91, %92, %93, %94, %95",                                 \
                     "%96, %97, %98, %99", "%100", PROXSPARSE_SUMS64(0), PROXSPARSE_SUMS16(64),            \
                     PROXSPARSE_SUMS16(80));                                                               \
  } else {                                                                                                 \
    PROXSPARSE_WGMMA("256", TYPE, SIGNS,                                                                   \
                     PROXSPARSE_SIXTY PROXSPARSE_TEN(6) PROXSPARSE_TEN(7) PROXSPARSE_TEN(8)                \
                         PROXSPARSE_TEN(9) PROXSPARSE_TEN(10)                                              \
                             PROXSPARSE_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127",          \
                     "%128, %129, %130, %131", "%132", PROXSPARSE_SUMS64(0),                               \
                     PROXSPARSE_SUMS64(64));                                                               \
  }

struct Fp8 {};  // stands for numbers of 8 bits, e4m3

// Begins sum[64 rows, kTokens] += w[64, 32] x[32, kTokens] with a 2:4 w, of which the 16 kept
// columns, in a tile with rows of kRowBytes, and their positions are given; without `adds`, the sum
// begins anew. With numbers of 8 bits, these are as many bytes: 64 columns, of which 32 are kept.
// All 128 threads of a warpgroup together. Neither operand nor sum may be touched before
// `wait_for_products`.
template <typename T, int kTokens, int kSelector, int kRowBytes = kTileRowBytes>
__device__ __forceinline__ void multiply_add_2to4(float (&sum)[kTokens / 2], Operand w, Operand x,
                                                  std::uint32_t metadata, int adds = 1) {
  static_assert(kTokens == 8 || kTokens == 16 || kTokens == 32 || kTokens == 64 || kTokens == 96 ||
                kTokens == 128 || kTokens == 160 || kTokens == 192 || kTokens == 256);
  if constexpr (std::is_same_v<T, Fp8>) {
    static_assert(kSelector == 0);
    PROXSPARSE_PRODUCT("k64.f32.e4m3.e4m3", "1, 1")
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    PROXSPARSE_PRODUCT("k32.f32.bf16.bf16", "1, 1, 0, 0")
  } else {
    PROXSPARSE_PRODUCT("k32.f32.f16.f16", "1, 1, 0, 0")
  }
}

#undef PROXSPARSE_PRODUCT
#undef PROXSPARSE_SUMS64
#undef PROXSPARSE_SUMS16
#undef PROXSPARSE_SUMS4
#undef PROXSPARSE_SIXTY
#undef PROXSPARSE_TEN
#undef PROXSPARSE_WGMMA

}  // namespace proxsparse
