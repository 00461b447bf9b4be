// `sparse_linear_decode` on Hopper, with its copy engine and its products of a warpgroup.
//
// One thread of a block does nothing but ask for copies: whole tiles of values and tokens and the
// codes between them land in shared memory without passing through registers, several chunks ahead.
// Two warpgroups multiply: the tensor cores read values and tokens from shared memory where they
// landed; only the codes pass through registers, as metadata. So copies never wait for products,
// and up to 64 tokens a block is bound by what it reads. More than 128 are dealt out to several
// blocks of the same rows.
//
// Weights that are multiplied with the same tokens share a launch, each with blocks of its own: a
// small one alone leaves most of the GPU idle, and any launch a moment of it.
//
// The form of the weight, the rows of a block and the split of the columns over a cluster are those
// of sparse_linear_decode.cu. Every sum has a fixed order: results are bitwise reproducible.
//
// In FP8 all this holds byte for byte, with twice as many columns in as many bytes. Columns are
// counted in 16 bits here, so they are two each. The codes are twice as many bytes, in tiles of
// another kind, and each product has a register of its own of them.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "hopper.h"
#include "packed_weight.h"
#include "sparse_linear_decode.h"

namespace proxsparse {
namespace {

constexpr int kColumns = 128;  // of a chunk: a row of values then is a row of a tile
constexpr int kSteps = kColumns / kStep;
constexpr int kWarpgroups = 2, kMultipliers = 128 * kWarpgroups, kThreads = kMultipliers + 32;
constexpr int kMaxStages = 16, kStagesAt = 1024;  // before them, two barriers for each

// The constants of one kernel.
template <typename Scalar, int rows, int tokens, typename Factor = Scalar>
struct Shape {
  using T = Scalar;
  using Input = Factor;
  static constexpr bool kIs8Bit = std::is_same_v<Factor, Fp8>;
  static constexpr int kPerWord = kIs8Bit ? 2 : 1;         // numbers in 16 bits
  static constexpr int kTileBytes = kCodeTile * kPerWord;  // codes of 64 rows and 32 columns
  static constexpr int kRows = rows, kTokens = tokens;
  // Warpgroups split the rows, of which a product takes 64. Where there are but 64, they take turns
  // at the chunks.
  static constexpr int kColumnGroups = rows == 64 ? kWarpgroups : 1;
  static constexpr int kRowTiles = rows == 64 ? 1 : rows / (64 * kWarpgroups);
  static constexpr int kReaders = kMultipliers / kColumnGroups;  // threads, of a chunk
  static constexpr int kTokensAt = rows * kTileRowBytes;
  static constexpr int kTokenTile = tokens * kTileRowBytes;  // 64 columns
  static constexpr int kCodesAt = kTokensAt + kSteps * kTokenTile;
  static constexpr int kCodeBytes = kColumns / kCodeColumns * kTileBytes;  // of 64 rows
  static constexpr int kStageBytes = kCodesAt + rows / kCodeRows * kCodeBytes;
  static constexpr int kMostSharedBytes = 227 * 1024;
  static constexpr int kSumStride = rows + 4;  // of a token; the 4 spread a warp over all banks
  static constexpr int kSumBytes = kColumnGroups * tokens * kSumStride * 4;
  static_assert(kStageBytes % kTileAlignment == 0 && 2 * kStageBytes >= kSumBytes);
  // On a multiprocessor, for which registers are set aside.
  static constexpr int kBlocks = kRowTiles * tokens * kPerWord > 128 ? 1 : 2;
};

template <typename T>
struct Weight {
  TileMap values;
  const std::uint8_t* codes;
  const T* bias;
  const float* scales;  // of its rows, in FP8
  T* y;
  int N, end;  // of its tiles of rows, among those of all weights
};

template <typename T>
struct Weights {
  Weight<T> of[kMaxDecodeWeights];
};

template <typename S>
__global__ void __launch_bounds__(kThreads, S::kBlocks)
    sparse_linear_decode_hopper_kernel(const __grid_constant__ TileMap x,
                                       const __grid_constant__ Weights<typename S::T> weights,
                                       const float* token_scales, int M, int K, int token_tiles,
                                       int splits, int stages) {
  using T = typename S::T;
  unsigned char* shared = dynamic_shared_memory();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int part = blockIdx.x % splits, block = blockIdx.x / splits;
  int index = 0;
  while (block / token_tiles >= weights.of[index].end) ++index;
  const Weight<T>& weight = weights.of[index];
  const int begin_tile = index == 0 ? 0 : weights.of[index - 1].end, N = weight.N;
  const int first_row = (block / token_tiles - begin_tile) * S::kRows;
  const int first_token = block % token_tiles * S::kTokens;
  const int num_chunks = (K + kColumns - 1) / kColumns;
  const int begin = num_chunks * part / splits, count = num_chunks * (part + 1) / splits - begin;
  Barrier* landed = reinterpret_cast<Barrier*>(shared);
  Barrier* read = landed + kMaxStages;
  unsigned char* ring = shared + kStagesAt;
  if (thread == 0) {
    for (int i = 0; i < stages; ++i) {
      make_barrier(landed + i, 1);
      make_barrier(read + i, S::kReaders);
    }
    show_barriers();
  }
  __syncthreads();
  let_next_grid_start();

  const auto columns_left = [&](int i) { return min(kColumns, K - (begin + i) * kColumns); };
  float sums[S::kRowTiles][S::kTokens / 2] = {};
  const int warpgroup = warp / 4;
  const int row_group = S::kColumnGroups == 1 ? warpgroup : 0;
  const int column_group = S::kColumnGroups == 1 ? 0 : warpgroup;
  if (thread == kMultipliers) {
    // Tiles past the last row or column are zeros, of the full size. Codes are not a matrix: of
    // rows past the last those of the last tile are read, which selects among zeros.
    const auto load_weight = [&](int i, int stage) {
      unsigned char* to = ring + stage * S::kStageBytes;
      const int column = (begin + i) * kColumns;
      const int code_bytes = columns_left(i) / kCodeColumns * S::kTileBytes;
      arrive_and_expect(landed + stage, S::kCodesAt + S::kRows / kCodeRows * code_bytes);
      copy_tile(to, weight.values, first_row, column / 2, landed + stage);
      for (int j = 0; j < S::kRows / kCodeRows; ++j) {
        const std::int64_t tile_row = min(first_row + j * kCodeRows, N - 1) / kCodeRows;
        const std::int64_t tile = tile_row * (K / kCodeColumns) + column / kCodeColumns;
        copy_bytes(to + S::kCodesAt + j * S::kCodeBytes, weight.codes + tile * S::kTileBytes,
                   code_bytes, landed + stage);
      }
    };
    const auto load_tokens = [&](int i, int stage) {
      unsigned char* to = ring + stage * S::kStageBytes + S::kTokensAt;
      for (int step = 0; step < kSteps; ++step) {
        const int column = (begin + i) * kColumns + step * kStep;
        copy_tile(to + step * S::kTokenTile, x, first_token, column, landed + stage);
      }
    };
    // The weight does not depend on the kernel before, so its first chunks are under way while that
    // one ends; the tokens may be what it writes.
    const int ahead = min(stages, count);
    for (int i = 0; i < ahead; ++i) load_weight(i, i);
    wait_for_previous_grid();
    for (int i = 0; i < ahead; ++i) load_tokens(i, i);
    Turn turn;
    for (int i = ahead; i < count; ++i) {
      wait_for_phase(read + turn.stage, turn.parity);
      load_weight(i, turn.stage);
      load_tokens(i, turn.stage);
      turn.advance(1, stages);
    }
  } else if (thread < kMultipliers) {
    Turn turn;
    turn.advance(column_group, stages);
    for (int i = column_group; i < count; i += S::kColumnGroups) {
      wait_for_phase(landed + turn.stage, turn.parity);
      const unsigned char* stage = ring + turn.stage * S::kStageBytes;
      const int steps = columns_left(i) / kStep;
      std::uint32_t metadata[S::kRowTiles][kSteps][S::kPerWord];
#pragma unroll
      for (int tile = 0; tile < S::kRowTiles; ++tile) {
        const unsigned char* from =
            stage + S::kCodesAt + (row_group * S::kRowTiles + tile) * S::kCodeBytes;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          // Past the last column there are no codes: any that are valid do, to select among zeros.
          if constexpr (S::kIs8Bit) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int at = (step * 2 + half) * S::kTileBytes + (warp % 4 * 32 + lane) * 4;
              metadata[tile][step][half] =
                  step < steps ? *reinterpret_cast<const std::uint32_t*>(from + at) : 0x44444444;
            }
          } else {
            const CodePlace place = code_place(step, warp % 4, lane);
            metadata[tile][step][0] =
                step < steps ? metadata_of(from + place.piece * kPiece + place.offset, lane % 2)
                             : 0x44444444;
          }
        }
      }
      begin_products();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const auto half_step = [&](auto selector) {
          constexpr int kHalf = decltype(selector)::value;
          const unsigned char* b = stage + S::kTokensAt + step * S::kTokenTile + kHalf * 64;
#pragma unroll
          for (int tile = 0; tile < S::kRowTiles; ++tile) {
            const int row = (row_group * S::kRowTiles + tile) * 64;
            const unsigned char* a = stage + row * kTileRowBytes + step * 64 + kHalf * 32;
            multiply_add_2to4<typename S::Input, S::kTokens, S::kIs8Bit ? 0 : kHalf>(
                sums[tile], a, b, metadata[tile][step][S::kIs8Bit ? kHalf : 0]);
          }
        };
        half_step(std::integral_constant<int, 0>());
        half_step(std::integral_constant<int, 1>());
      }
      commit_products();
      wait_for_products<0>();
#pragma unroll
      for (int tile = 0; tile < S::kRowTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kSteps * S::kPerWord; ++i) {
          keep(metadata[tile][i / S::kPerWord][i % S::kPerWord]);
        }
      }
      arrive(read + turn.stage);
      turn.advance(S::kColumnGroups, stages);
    }
  }
  __syncwarp();
  wait_for_previous_grid();  // memory to write to may be that kernel's

  // The sums of the column groups, over the stages that nobody reads any more.
  __syncthreads();
  float* partial = reinterpret_cast<float*>(ring);
  if (thread < kMultipliers) {
#pragma unroll
    for (int tile = 0; tile < S::kRowTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < S::kTokens / 2; ++i) {
        const int row =
            (row_group * S::kRowTiles + tile) * 64 + warp % 4 * 16 + lane / 4 + i % 4 / 2 * 8;
        const int m = column_group * S::kTokens + i / 4 * 8 + lane % 4 * 2 + i % 2;
        partial[m * S::kSumStride + row] = sums[tile][i];
      }
    }
  }
  __syncthreads();
  store_sums<T, S::kRows, S::kTokens, S::kColumnGroups, S::kSumStride, kThreads>(
      partial, weight.bias, weight.y + static_cast<std::int64_t>(first_token) * N,
      min(M - first_token, S::kTokens), N, first_row, part, splits, weight.scales,
      S::kIs8Bit ? token_scales + first_token : nullptr);
}

template <typename S>
const char* launch(const DecodeCall& call, int index, const Device& device,
                   const DecodeLayout& layout) {
  using T = typename S::T;
  // Of a multiprocessor's memory the system takes 1 KB for each block; depth 1 is for two blocks.
  const int most = device.shared_bytes + 1024;
  const auto stages_in = [&](int bytes) { return (bytes - 1024 - kStagesAt) / S::kStageBytes; };
  int stages = std::min(stages_in(layout.depth == 2 ? most : most / 2), kMaxStages);
  if (stages < 2) stages = stages_in(most);
  // A stage is always the same warpgroup's: a phase shows by its parity alone, and one that is
  // ahead of the other would take the other's chunk for its next.
  stages -= stages % S::kColumnGroups;
  TileMap x;
  const int columns = call.in_features / S::kPerWord;
  const char* error = describe_tiles(&x, call.x, call.tokens, columns, call.x_stride / S::kPerWord,
                                     S::kTokens, call.is_bfloat16);
  Weights<T> weights;
  int row_tiles = 0;
  for (int i = 0; i < call.num_weights && error == nullptr; ++i) {
    const DecodeWeight& from = call.weights[i];
    row_tiles += (from.out_features + S::kRows - 1) / S::kRows;
    Weight<T>& to = weights.of[i];
    to.codes = static_cast<const std::uint8_t*>(from.codes);
    to.bias = static_cast<const T*>(from.bias);
    to.scales = S::kIs8Bit ? from.row_scales : nullptr;
    to.y = static_cast<T*>(from.y);
    to.N = from.out_features;
    to.end = row_tiles;
    error = describe_tiles(&to.values, from.values, from.out_features, columns / 2, columns / 2,
                           S::kRows, call.is_bfloat16);
  }
  if (error != nullptr) return error;
  const int token_tiles = (call.tokens + S::kTokens - 1) / S::kTokens;
  return launch_kernel<S>(sparse_linear_decode_hopper_kernel<S>, call, device, index,
                          row_tiles * token_tiles * layout.splits, layout.splits, kThreads,
                          kStagesAt + stages * S::kStageBytes, x, weights, call.token_scales,
                          call.tokens, columns, token_tiles, layout.splits, stages);
}

template <typename T, typename Input, int tokens>
const char* launch_for_tokens(const DecodeCall& call, int index, const Device& device,
                              const DecodeLayout& layout) {
  if (layout.rows == 256) return launch<Shape<T, 256, tokens, Input>>(call, index, device, layout);
  if (layout.rows == 128) return launch<Shape<T, 128, tokens, Input>>(call, index, device, layout);
  return launch<Shape<T, 64, tokens, Input>>(call, index, device, layout);
}

template <typename T, typename Input>
const char* launch_for_type(const DecodeCall& call, int index, const Device& device,
                            const DecodeLayout& layout) {
  if (call.tokens <= 8) return launch_for_tokens<T, Input, 8>(call, index, device, layout);
  if (call.tokens <= 16) return launch_for_tokens<T, Input, 16>(call, index, device, layout);
  if (call.tokens <= 32) return launch_for_tokens<T, Input, 32>(call, index, device, layout);
  if (call.tokens <= 64) return launch_for_tokens<T, Input, 64>(call, index, device, layout);
  return launch_for_tokens<T, Input, 128>(call, index, device, layout);
}

// What was fastest on an H200, without trying, or within some percent of it. Half as many blocks
// as multiprocessors draw most of the bandwidth for a few microseconds, which is all that a small
// weight takes; a cluster costs one or two. A long row takes longer, and is worth a whole wave.
DecodeLayout choose_layout(const DecodeCall& call, const Device& device) {
  DecodeLayout layout = call.layout;
  const int most = device.multiprocessors, enough = most * 5 / 6;
  const int token_tiles = (call.tokens + 127) / 128;
  const auto tiles = [&](int rows) {
    int row_tiles = 0;
    for (int i = 0; i < call.num_weights; ++i) {
      row_tiles += (call.weights[i].out_features + rows - 1) / rows;
    }
    return row_tiles * token_tiles;
  };
  if (layout.rows == 0) {
    const bool is_one_wave = tiles(256) >= enough && tiles(256) <= most;
    layout.rows = tiles(64) <= 2 * most ? 64 : is_one_wave && call.tokens <= 16 ? 256 : 128;
  }
  const int blocks = tiles(layout.rows);
  if (layout.splits == 0) {
    const int wanted = call.in_features > 8192 ? enough : most * 2 / 5;
    layout.splits = 1;
    while (layout.splits < 8 && blocks * layout.splits < wanted &&
           call.in_features >= 512 * layout.splits) {
      layout.splits *= 2;
    }
  }
  if (layout.depth == 0) layout.depth = blocks * layout.splits <= most ? 2 : 1;
  return layout;
}

}  // namespace

const char* sparse_linear_decode_hopper(const DecodeCall& call, int index, const Device& device) {
  if (call.tokens > kMaxHopperTokens) return "1 to 256 tokens are supported";
  const DecodeLayout layout = choose_layout(call, device);
  if (call.is_fp8) {
    return call.is_bfloat16 ? launch_for_type<__nv_bfloat16, Fp8>(call, index, device, layout)
                            : launch_for_type<__half, Fp8>(call, index, device, layout);
  }
  return call.is_bfloat16
             ? launch_for_type<__nv_bfloat16, __nv_bfloat16>(call, index, device, layout)
             : launch_for_type<__half, __half>(call, index, device, layout);
}

}  // namespace proxsparse
