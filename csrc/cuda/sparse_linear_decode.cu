// The product with a packed 2:4 weight for 1 to 64 tokens: y[M, N] = x[M, K] W[N, K]^T + bias. On
// Hopper sparse_linear_decode_hopper.cu computes it; the kernel here is for all other GPUs with
// sparse tensor cores.
//
// With so few tokens the time is that of reading the weight, 9/16 of its dense bytes. So the kernel
// is a pipe: asynchronous copies keep several chunks of weight under way to shared memory, and
// sparse tensor cores (mma.sp, the weight as the sparse operand, 8 tokens a tile) drain it.
//
// The weight is read as cuSPARSELt keeps it on Hopper, so that one copy serves both; no third
// layout exists.
// * Values are those of `pack_2to4`, [N, K/2]. ldmatrix hands 16 bytes of a row to the four threads
//   that own them in the fragment, so rows can be copied as they lie (16-byte pieces swizzled
//   against bank conflicts).
// * Codes come in tiles of 64 rows and 32 columns, 256 bytes each, a row of tiles after the other:
//   see `reference.tile_codes`. Rows r and r + 8 of 16 share bytes, which are the metadata of one
//   fragment but for the order of its nibbles.
//
// A block owns `kRows` rows and, with its cluster, all columns: the blocks of a cluster split the
// columns and add their partial sums through distributed shared memory. Within a block, row warps
// split the rows and column warps the columns. Every sum has a fixed order: results are bitwise
// reproducible.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <type_traits>

#include "packed_weight.h"
#include "ptx.h"
#include "sparse_linear_decode.h"

namespace proxsparse {
namespace {

// The constants of one kernel. A chunk is `kColumns` columns of the block's rows, with the same
// columns of the tokens.
template <typename Scalar, int rows, int row_tiles, int token_tiles, int columns, int stages>
struct Shape {
  using T = Scalar;
  static constexpr int kRows = rows, kRowTiles = row_tiles, kTokenTiles = token_tiles;
  static constexpr int kColumns = columns, kStages = stages;
  static constexpr int kTokens = 8 * token_tiles;
  static constexpr int kRowWarps = rows / (16 * row_tiles);
  static constexpr int kColumnWarps =
      8 / kRowWarps < columns / kStep ? 8 / kRowWarps : columns / kStep;
  static constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
  static constexpr int kValueBytes = columns, kTokenBytes = 2 * columns;  // of a row
  static constexpr int kCodeBytes = columns / kCodeColumns * kCodeTile;   // of 64 rows
  static constexpr int kCodesAt = rows * kValueBytes;
  static constexpr int kTokensAt = kCodesAt + rows / kCodeRows * kCodeBytes;
  static constexpr int kStageBytes = kTokensAt + kTokens * kTokenBytes;
  static constexpr int kSumStride = rows + 4;  // of a token; the 4 spread a warp over all banks
  static constexpr int kSumBytes = kColumnWarps * kTokens * kSumStride * 4;
  static constexpr int kSharedBytes =
      stages * kStageBytes > kSumBytes ? stages * kStageBytes : kSumBytes;
  static constexpr int kMostSharedBytes = kSharedBytes;
  // On a multiprocessor, for which registers are set aside; the sums of many tokens need them all.
  static constexpr int kBlocks = 2 * kSharedBytes <= 227 * 1024 && token_tiles <= 4 ? 2 : 1;
};

// Where piece `index` of row `row` lies: pieces are exchanged within a row so that the same piece
// of 8 successive rows falls into different banks.
template <int kRowBytes>
__device__ __forceinline__ int swizzled(int row, int index) {
  return row * kRowBytes + ((index ^ (row & 7)) * kPiece);
}

// Where piece `index` of the codes of 64 rows lies. Threads of a quad read two neighbouring tiles
// at once: in every other tile 16 rows change places with their neighbours, which parts the banks.
__device__ __forceinline__ int swizzled_codes(int index) {
  return (index ^ index / 4 & 4) * kPiece;
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    sparse_linear_decode_kernel(const typename S::T* __restrict__ x,
                                const typename S::T* __restrict__ values,
                                const std::uint8_t* __restrict__ codes,
                                const typename S::T* __restrict__ bias,
                                typename S::T* __restrict__ y, int M, int N, int K,
                                std::int64_t x_stride, int splits) {
  using T = typename S::T;
  unsigned char* shared = dynamic_shared_memory();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row_warp = warp % S::kRowWarps, column_warp = warp / S::kRowWarps;
  const int first_row = blockIdx.x / splits * S::kRows, part = blockIdx.x % splits;
  const int num_chunks = (K + S::kColumns - 1) / S::kColumns;
  const int begin = num_chunks * part / splits, end = num_chunks * (part + 1) / splits;

  // Rows past the last repeat it: they are computed and not stored. Offsets have 32 bits, since
  // each thread keeps several: `sparse_linear_decode` refuses larger weights.
  const auto values_of = [&](int row, int column) {
    const std::uint32_t offset = static_cast<std::uint32_t>(min(row, N - 1)) * K + column;
    return reinterpret_cast<const unsigned char*>(values) + offset;
  };
  const auto codes_of = [&](int row, int column) {
    const std::uint32_t tile_row = min(row, N - 1) / kCodeRows;
    return codes + (tile_row * (K / kCodeColumns) + column / kCodeColumns) * kCodeTile;
  };

  // Chunk i of the weight, and of the tokens, by `stride` threads of which this is number `first`.
  const auto stage_of = [&](int i) { return shared + i % S::kStages * S::kStageBytes; };
  const auto load_weight = [&](int i, int first, auto stride) {
    constexpr int kStride = decltype(stride)::value;
    const int column = (begin + i) * S::kColumns, left = min(S::kColumns, K - column);
    constexpr int kValuePieces = S::kValueBytes / kPiece;
#pragma unroll
    for (int j = first; j < S::kRows * kValuePieces; j += kStride) {
      const int row = j / kValuePieces, piece = j % kValuePieces;
      if (piece * kPiece < left) {
        copy_weight(stage_of(i) + swizzled<S::kValueBytes>(row, piece),
                    values_of(first_row + row, column) + piece * kPiece);
      }
    }
    constexpr int kCodePieces = S::kCodeBytes / kPiece;
#pragma unroll
    for (int j = first; j < S::kRows / kCodeRows * kCodePieces; j += kStride) {
      const int block = j / kCodePieces, piece = j % kCodePieces;
      if (piece * (kCodeColumns * kPiece / kCodeTile) < left) {
        copy_weight(stage_of(i) + S::kCodesAt + block * S::kCodeBytes + swizzled_codes(piece),
                    codes_of(first_row + block * kCodeRows, column) + piece * kPiece);
      }
    }
  };
  const auto load_tokens = [&](int i, int first, auto stride) {
    constexpr int kStride = decltype(stride)::value;
    const int column = (begin + i) * S::kColumns, left = min(S::kColumns, K - column);
    constexpr int kTokenPieces = S::kTokenBytes / kPiece;
#pragma unroll 8
    for (int j = first; j < S::kTokens * kTokenPieces; j += kStride) {
      const int token = j / kTokenPieces, piece = j % kTokenPieces;
      const bool exists = token < M;
      if (piece * 8 < left) {
        copy_tokens(stage_of(i) + S::kTokensAt + swizzled<S::kTokenBytes>(token, piece),
                    x + (exists ? token * x_stride + column + piece * 8 : 0), exists);
      }
    }
  };

  // The weight does not depend on the kernel before, so its first chunks are under way while that
  // one ends. The tokens, and memory to write to, may be that kernel's until it has. Copies arrive
  // for the thread that asked for them, and in order: so that no weight waits for tokens, different
  // warps ask here.
  constexpr int kTokenThreads = S::kThreads / 4, kWeightThreads = S::kThreads - kTokenThreads;
  const int count = end - begin;
  const bool loads_weight = thread < kWeightThreads;
  let_next_grid_start();
  if (!loads_weight) wait_for_previous_grid();
  for (int i = 0; i < S::kStages - 1; ++i) {
    if (i < count && loads_weight) {
      load_weight(i, thread, std::integral_constant<int, kWeightThreads>());
    } else if (i < count) {
      load_tokens(i, thread - kWeightThreads, std::integral_constant<int, kTokenThreads>());
    }
    commit_copies();
  }
  if (loads_weight) wait_for_previous_grid();

  float sums[S::kRowTiles][S::kTokenTiles][4] = {};
  const int warp_row = row_warp * 16 * S::kRowTiles;
  const int matrix = lane / 8, matrix_row = lane % 8;
  for (int i = 0; i < count; ++i) {
    wait_for_copies<S::kStages - 2>();
    __syncthreads();  // this chunk has arrived, and all warps are done with the one before it
    if (i + S::kStages - 1 < count) {
      constexpr std::integral_constant<int, S::kThreads> kAll;
      load_weight(i + S::kStages - 1, thread, kAll);
      load_tokens(i + S::kStages - 1, thread, kAll);
    }
    commit_copies();

    const unsigned char* stage = stage_of(i);
    const int steps = min(S::kColumns, K - (begin + i) * S::kColumns) / kStep;
    for (int step = column_warp; step < steps; step += S::kColumnWarps) {
      std::uint32_t metadata[S::kRowTiles];
#pragma unroll
      for (int tile = 0; tile < S::kRowTiles; ++tile) {
        const int row = warp_row + 16 * tile;
        const CodePlace place = code_place(step, row % kCodeRows / 16, lane);
        const unsigned char* bytes = stage + S::kCodesAt + row / kCodeRows * S::kCodeBytes +
                                     swizzled_codes(place.piece) + place.offset;
        metadata[tile] = metadata_of(bytes, lane % 2);
      }
      const auto half_step = [&](auto selector) {
        constexpr int kHalf = decltype(selector)::value;
        std::uint32_t w[S::kRowTiles][4];
#pragma unroll
        for (int tile = 0; tile < S::kRowTiles; ++tile) {
          const int row = warp_row + 16 * tile + matrix_row + matrix % 2 * 8;
          load_matrices(w[tile],
                        stage + swizzled<S::kValueBytes>(row, step * 4 + kHalf * 2 + matrix / 2));
        }
#pragma unroll
        for (int token = 0; token < S::kTokenTiles; ++token) {
          std::uint32_t b[4];
          load_matrices(b, stage + S::kTokensAt +
                               swizzled<S::kTokenBytes>(token * 8 + matrix_row,
                                                        step * 8 + kHalf * 4 + matrix));
#pragma unroll
          for (int tile = 0; tile < S::kRowTiles; ++tile) {
            multiply_add_2to4<kHalf, T>(sums[tile][token], w[tile], b, metadata[tile]);
          }
        }
      };
      half_step(std::integral_constant<int, 0>());
      half_step(std::integral_constant<int, 1>());
    }
  }

  // The partial sums of the column warps, over the stages that nobody reads any more.
  wait_for_copies<0>();
  __syncthreads();
  float* partial = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int tile = 0; tile < S::kRowTiles; ++tile) {
#pragma unroll
    for (int token = 0; token < S::kTokenTiles; ++token) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp_row + 16 * tile + lane / 4 + i / 2 * 8;
        const int m = column_warp * S::kTokens + token * 8 + lane % 4 * 2 + i % 2;
        partial[m * S::kSumStride + row] = sums[tile][token][i];
      }
    }
  }
  __syncthreads();

  store_sums<T, S::kRows, S::kTokens, S::kColumnWarps, S::kSumStride, S::kThreads>(
      partial, bias, y, M, N, first_row, part, splits);
}

template <typename S>
const char* launch(const DecodeCall& call, const DecodeWeight& weight, int index,
                   const Device& device, int splits) {
  using T = typename S::T;
  const int blocks = (weight.out_features + S::kRows - 1) / S::kRows * splits;
  return launch_kernel<S>(
      sparse_linear_decode_kernel<S>, call, device, index, blocks, splits, S::kThreads,
      S::kSharedBytes, static_cast<const T*>(call.x), static_cast<const T*>(weight.values),
      static_cast<const std::uint8_t*>(weight.codes), static_cast<const T*>(weight.bias),
      static_cast<T*>(weight.y), call.tokens, weight.out_features, call.in_features, call.x_stride,
      splits);
}

// Stages that fill most of the 227 KB of a Hopper multiprocessor, or half of it.
template <int rows, int token_tiles, int columns = 256>
constexpr int stages(bool deep) {
  constexpr int kStage = rows * columns * 9 / 8 + token_tiles * 16 * columns;
  const int most = (deep ? 227 : 113) * 1024 / kStage;
  return most < 2 ? 2 : most > 8 ? 8 : most;
}

template <typename T, int token_tiles>
const char* launch_for_tokens(const DecodeCall& call, const DecodeWeight& weight, int index,
                              const Device& device, const DecodeLayout& layout) {
  // Two row tiles a warp read the tokens from shared memory half as often, four a quarter as often.
  constexpr int kRowTiles = token_tiles > 2 ? 2 : 1;
  constexpr int kManyTiles = token_tiles > 4 ? 4 : kRowTiles;
  constexpr int kTiles256 = token_tiles > 4 ? 4 : 2;
  const auto fits = [&](int bytes) { return bytes <= device.shared_bytes; };
  using Deep64 = Shape<T, 64, kRowTiles, token_tiles, 256, stages<64, token_tiles>(true)>;
  using Half64 = Shape<T, 64, kRowTiles, token_tiles, 256, stages<64, token_tiles>(false)>;
  using Deep128 = Shape<T, 128, kManyTiles, token_tiles, 256, stages<128, token_tiles>(true)>;
  using Half128 = Shape<T, 128, kManyTiles, token_tiles, 256, stages<128, token_tiles>(false)>;
  using Deep256 = Shape<T, 256, kTiles256, token_tiles, 128, stages<256, token_tiles, 128>(true)>;
  using Small = Shape<T, 64, kRowTiles, token_tiles, 128, 3>;  // for GPUs with less memory
  if (layout.rows == 256 && fits(Deep256::kSharedBytes)) {
    return launch<Deep256>(call, weight, index, device, layout.splits);
  }
  if (layout.rows >= 128) {
    if (layout.depth == 2 && fits(Deep128::kSharedBytes)) {
      return launch<Deep128>(call, weight, index, device, layout.splits);
    }
    if (fits(Half128::kSharedBytes))
      return launch<Half128>(call, weight, index, device, layout.splits);
  }
  if (layout.depth == 2 && fits(Deep64::kSharedBytes)) {
    return launch<Deep64>(call, weight, index, device, layout.splits);
  }
  if (fits(Half64::kSharedBytes)) return launch<Half64>(call, weight, index, device, layout.splits);
  if (fits(Small::kSharedBytes)) return launch<Small>(call, weight, index, device, layout.splits);
  return "this GPU has too little shared memory per block";
}

// What was fastest on an H100 before it had a kernel of its own, for want of other measurements.
// There, one wave of blocks that leaves few multiprocessors idle is what counts; two blocks on each
// do no harm, and many tokens want large blocks, which read them less often.
DecodeLayout choose_layout(const DecodeCall& call, const DecodeWeight& weight,
                           const Device& device) {
  DecodeLayout layout = call.layout;
  const int most = device.multiprocessors, enough = most * 5 / 6;
  const auto tiles = [&](int rows) { return (weight.out_features + rows - 1) / rows; };
  if (layout.rows == 0) {
    const int blocks = call.tokens > 32 ? enough : 2 * most + 1;
    layout.rows = tiles(256) >= blocks ? 256 : tiles(128) >= blocks ? 128 : 64;
    if (call.tokens <= 32 && tiles(64) > 2 * most) layout.rows = 128;
  }
  const int blocks = tiles(layout.rows);
  if (layout.splits == 0) {
    layout.splits = 1;
    const auto is_few = [&] {
      const bool is_long = call.tokens <= 32 && call.in_features / layout.splits >= 16384;
      return blocks * layout.splits < (is_long ? most : enough);
    };
    while (device.major >= 9 && layout.splits < 8 && is_few() &&
           call.in_features >= 512 * layout.splits) {
      layout.splits *= 2;
    }
  }
  if (layout.depth == 0) {
    // Large clusters of blocks that fill a multiprocessor each leave some of them empty.
    layout.depth = blocks * layout.splits <= most && layout.splits <= 2 ? 2 : 1;
  }
  return layout;
}

template <typename T>
const char* launch_for_type(const DecodeCall& call, const DecodeWeight& weight, int index,
                            const Device& device) {
  const DecodeLayout layout = choose_layout(call, weight, device);
  if (layout.splits > 1 && device.major < 9) return "splits need compute capability 9.0";
  if (call.tokens <= 8) return launch_for_tokens<T, 1>(call, weight, index, device, layout);
  if (call.tokens <= 16) return launch_for_tokens<T, 2>(call, weight, index, device, layout);
  if (call.tokens <= 32) return launch_for_tokens<T, 4>(call, weight, index, device, layout);
  return launch_for_tokens<T, 8>(call, weight, index, device, layout);
}

}  // namespace

const char* sparse_linear_decode(const DecodeCall& call) {
  if (call.tokens < 1) return "at least one token is needed";
  if (call.num_weights < 1 || call.num_weights > kMaxDecodeWeights)
    return "1 to 4 weights are supported";
  if (call.in_features % kStep != 0) return "in_features must be a multiple of 64";
  if (call.is_fp8 && call.in_features % (2 * kStep) != 0) {
    return "with numbers of 8 bits in_features must be a multiple of 128";
  }
  const auto misaligned = [](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % kPiece != 0;
  };
  bool is_misaligned = misaligned(call.x) || call.x_stride % (call.is_fp8 ? 16 : 8) != 0;
  bool has_scales = call.token_scales != nullptr;
  for (int i = 0; i < call.num_weights; ++i) {
    const DecodeWeight& weight = call.weights[i];
    if (static_cast<std::int64_t>(weight.out_features) * call.in_features >= std::int64_t{1}
                                                                                 << 32) {
      return "a weight must have fewer than 2^32 entries";
    }
    is_misaligned = is_misaligned || misaligned(weight.values) || misaligned(weight.codes);
    has_scales = has_scales && weight.row_scales != nullptr;
  }
  if (call.is_fp8 && !has_scales) return "numbers of 8 bits need scales of rows and tokens";
  if (is_misaligned) return "x, values, codes and the rows of x must be aligned to 16 bytes";
  int index = 0;
  const Device* device = current_device(index);
  if (device == nullptr) return "the attributes of the current device cannot be read";
  if (device->major < 8) return "sparse tensor cores need compute capability 8.0";
  if (device->major == 9) return sparse_linear_decode_hopper(call, index, *device);
  if (call.is_fp8) return "with numbers of 8 bits compute capability 9.0 is needed";
  if (call.tokens > kMaxDecodeTokens) return "1 to 64 tokens are supported";
  const char* error = nullptr;
  for (int i = 0; i < call.num_weights && error == nullptr; ++i) {
    const DecodeWeight& weight = call.weights[i];
    error = call.is_bfloat16 ? launch_for_type<__nv_bfloat16>(call, weight, index, *device)
                             : launch_for_type<__half>(call, weight, index, *device);
  }
  return error;
}

}  // namespace proxsparse
