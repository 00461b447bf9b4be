// `sparse_linear_prefill`: the product with a packed 2:4 weight for many tokens, on Hopper.
//
// The product of 64 rows, 32 columns and 256 tokens reads 18 KB of shared memory, of which 16 KB
// can be read in its time at the peak: so shared memory is the bound, then copies through the L2
// cache, then power. So tiles are as large as registers allow.
//
// Two warpgroups multiply, 64 or twice 64 rows each; 64 columns of tokens, values and codes are a
// stage of a ring that both share, and the products of two stages are under way. Of a third
// warpgroup one warp asks for copies of the weight, one for those of tokens, and one stores
// results. The two blocks of a cluster take tiles above each other and load half of their tokens
// each, for both.
//
// Blocks stay for all tiles, and the ring runs on from one to the next: after a tile's last chunk
// come stages for its results, which are lent as if they had been copied to, and free again when
// they are stored; meanwhile the next tile is multiplied. Tiles seldom fill whole waves. So those
// beyond the last but one are shared out by columns (as in stream-K, Osama et al. 2023,
// arXiv:2301.03598): all blocks get equal parts of them, or nearly so, and who has the last columns
// of a tile adds what others have summed.
//
// What lies between a stage that has been read and its next data costs most, see
// benchmarks/results/NOTES.md: no division, and no loop that ptxas makes where it does not know
// that a warp's threads agree.
//
// In FP8 all this holds byte for byte, with twice as many columns in a stage. Only the codes
// differ: the places of a row come from one thread, so there are twice as many registers of them,
// and tiles of another kind. Sums are multiplied by the scales of their row and token when they are
// whole.
//
// Every sum has a fixed order: results are bitwise reproducible.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "hopper.h"
#include "packed_weight.h"
#include "prefill_plan.h"
#include "sparse_linear_prefill.h"

namespace proxsparse {
namespace {

constexpr int kValueRowBytes = kStep;  // a row of values of a stage: 32 of 16 bits
constexpr int kSliceRows = kCodeRows;  // of one product
constexpr int kSliceValueBytes = kSliceRows * kValueRowBytes;
constexpr int kStagesAt = 1024;                       // before them, barriers
constexpr int kMostStages = 8, kMostDeepStages = 10;  // these for 96 tokens
constexpr int kWarpgroups = 2;                        // that multiply
constexpr int kWeightWarp = 4 * kWarpgroups, kTokenWarp = kWeightWarp + 1;
constexpr int kResultWarp = kWeightWarp + 2;
constexpr int kCopyRegisters = 40, kSumRegisters = 232;  // of a thread

// The constants of one kernel: results are of type `Scalar`, operands of `Factor`.
template <typename Scalar, int rows, int tokens, typename Factor = Scalar>
struct Shape {
  using T = Scalar;
  using Input = Factor;
  static constexpr bool kIs8Bit = std::is_same_v<Factor, Fp8>;
  static constexpr int kPerWord = kIs8Bit ? 2 : 1;   // numbers in 16 bits
  static constexpr int kColumns = kStep * kPerWord;  // of a stage, whose rows have as many bytes
  static constexpr int kCodeBytes = kColumns * kCodeRows / 8;  // of a stage and a slice
  static constexpr int kMetadata = kPerWord;                   // registers of a slice
  static constexpr int kRows = rows, kTokens = tokens, kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kSlices = rows / kSliceRows / kWarpgroups;  // of a warpgroup
  static constexpr int kSums = kSlices * tokens / 2;               // of a thread

  // Of a stage: tokens, then values, then codes.
  static constexpr int kValuesAt = tokens * kTileRowBytes;
  static constexpr int kCodesAt = kValuesAt + rows * kValueRowBytes;
  static constexpr int kBytes = kCodesAt + rows / kSliceRows * kCodeBytes;
  static constexpr int kStageBytes =
      (kBytes + kTileAlignment - 1) / kTileAlignment * kTileAlignment;

  static constexpr int kMostSharedBytes = 227 * 1024;
  static constexpr int kStages = std::min((kMostSharedBytes - kStagesAt) / kStageBytes,
                                          tokens == 96 ? kMostDeepStages : kMostStages);
  static constexpr int kSharedBytes = kStagesAt + kStages * kStageBytes;

  // The results of a tile leave through stages of the ring, each with an equal part of those of
  // both warpgroups: 64 rows of one token, then of the next, by one or more stores.
  static constexpr int kSliceBytes = tokens * kTileRowBytes;
  static constexpr int kResultBytes = kSlices * kSliceBytes;  // of a warpgroup
  static constexpr int kResultStages = (kWarpgroups * kResultBytes + kStageBytes - 1) / kStageBytes;
  static constexpr int kPartBytes = kResultBytes / kResultStages;  // of that, in one stage
  // By one store: 64 tokens, or where those do not divide a part, all of it.
  static constexpr int kStoredTokens =
      kPartBytes % (64 * kTileRowBytes) == 0 ? 64 : kPartBytes / kTileRowBytes;
  static constexpr int kStoredBytes = kStoredTokens * kTileRowBytes;
  static_assert(kResultBytes % kResultStages == 0 && kPartBytes % kStoredBytes == 0 &&
                kStoredTokens % 16 == 0 && kSliceBytes % kStoredBytes == 0 &&
                kResultStages < kStages);

  // So many loads of what another block has summed are under way.
  static constexpr int most_loads(int most) {
    return kSums / 4 % most == 0 ? most : most_loads(most - 1);
  }
  static constexpr int kLoads = kSums > 128 ? 4 : most_loads(16);
};

// Chunks of columns of one tile, [first, last).
struct Segment {
  int tile, first, last;
};

// What one cluster computes, in its order. Of the first tiles, which are shared, it has an equal
// part, [begin, end) of their chunks; of the others every so many-th, as all others have at the
// same time. First comes the end of its part, because the cluster after this one waits for it.
struct Work {
  int begin, end, chunks, next_tile, tiles, clusters;

  // The first of the shared chunks that are the cluster's. Where every tile has as many clusters,
  // the last of them has `extra` chunks more than the others, whose sums it would else wait for.
  static __device__ int begin_of(int cluster, int clusters, int shared_tiles, int chunks,
                                 int extra) {
    if (extra == 0) {
      return static_cast<int>(std::int64_t{shared_tiles} * chunks * cluster / clusters);
    }
    const int parts = clusters / shared_tiles;
    return cluster / parts * chunks + cluster % parts * (chunks - extra) / parts;
  }

  __device__ bool next(Segment& segment) {
    if (begin < end) {
      const int tile = (end - 1) / chunks, first = max(begin - tile * chunks, 0);
      segment = {tile, first, end - tile * chunks};
      end = tile * chunks + first;
      return true;
    }
    segment = {next_tile, 0, chunks};
    next_tile += clusters;
    return segment.tile < tiles;
  }
};

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    sparse_linear_prefill_kernel(const __grid_constant__ TileMap x,
                                 const __grid_constant__ TileMap values,
                                 const __grid_constant__ TileMap y, const std::uint8_t* codes,
                                 const typename S::T* bias, const float* row_scales,
                                 const float* token_scales, int M, int N, int K, Tiles tiles,
                                 int shared_tiles, int extra, int cluster, int clusters, int share,
                                 float4* partial, int* signals) {
  using T = typename S::T;
  unsigned char* shared = dynamic_shared_memory();
  const int thread = threadIdx.x, warp = warp_index(), warpgroup = warp / 4;
  const int part = blockIdx.x % cluster, me = blockIdx.x / cluster;
  const int chunks = K / S::kColumns;
  Barrier* landed = reinterpret_cast<Barrier*>(shared);
  Barrier* read = landed + S::kStages;
  Barrier* written = read + S::kStages;  // of results
  unsigned char* ring = shared + kStagesAt;
  if (thread == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      make_barrier(landed + i, 1);
      make_barrier(read + i, cluster * kWarpgroups * 4);
      make_barrier(written + i, kWarpgroups * 4);
    }
    show_barriers();
  }
  __syncthreads();
  if (cluster > 1) synchronize_cluster();
  let_next_grid_start();
  const auto shared_begin = [&](int of) {
    return Work::begin_of(of, clusters, shared_tiles, chunks, extra);
  };
  const auto place_of = [&](int index) -> TilePlace {
    const TilePlace tile = tiles[index];
    return {(tile.row * cluster + part) * S::kRows, tile.token * S::kTokens};
  };
  Work work = {shared_begin(me),  shared_begin(me + 1), chunks,
               shared_tiles + me, tiles.count(),        clusters};
  Segment segment;

  if (warpgroup == kWarpgroups) {  // copies and stores
    give_registers<kCopyRegisters>();
    // Visits all chunks, and after those of a tile the stages for its results, as soon as their
    // stage has been read by all, which it is from the beginning.
    const auto for_all_stages = [&](const auto& visit) {
      Turn turn;
#pragma unroll 1
      while (work.next(segment)) {
        const TilePlace place = place_of(segment.tile);
        const int end = segment.last + (segment.last == chunks ? S::kResultStages : 0);
#pragma unroll 1
        for (int chunk = segment.first; chunk < end; ++chunk) {
          wait_for_phase(read + turn.stage, turn.parity ^ 1);
          if (is_elected()) visit(place, chunk, turn.stage, ring + turn.stage * S::kStageBytes);
          turn.advance(1, S::kStages);
        }
      }
    };
    // The weight does not depend on the kernel before, so its first chunks are under way while that
    // one ends; the tokens may be what it writes. Tiles past the last row or token are zeros, of
    // the full size. Codes are not a matrix: of rows past the last those of the last tile are read,
    // which selects among zeros.
    if (warp == kWeightWarp) {
      for_all_stages([&](TilePlace place, int chunk, int stage, unsigned char* at) {
        Barrier* barrier = landed + stage;
        if (chunk >= chunks) {
          arrive(barrier);  // for results
          return;
        }
        arrive_and_expect(barrier, S::kBytes);
        copy_tile(at + S::kValuesAt, values, place.row, chunk * kStep / 2, barrier);
#pragma unroll
        for (int i = 0; i < S::kRows / kSliceRows; ++i) {
          const std::int64_t code_row = min(place.row + i * kCodeRows, N - 1) / kCodeRows;
          copy_bytes(at + S::kCodesAt + i * S::kCodeBytes,
                     codes + (code_row * chunks + chunk) * S::kCodeBytes, S::kCodeBytes, barrier);
        }
      });
    } else if (warp == kTokenWarp) {
      wait_for_previous_grid();
      for_all_stages([&](TilePlace place, int chunk, int stage, unsigned char* at) {
        if (chunk >= chunks) return;
        Barrier* barrier = landed + stage;
        const int token = place.token + part * share;
        if (cluster == 1) {
          copy_tile(at, x, token, chunk * kStep, barrier);
        } else {
          copy_tile_to_cluster(at + part * share * kTileRowBytes, x, token, chunk * kStep, barrier,
                               (1 << cluster) - 1);
        }
      });
    } else if (warp == kResultWarp) {
      // A stage's results are counted by a barrier of its own, because not every turn has results;
      // its parity is the stage's bit.
      unsigned stage = 0, parities = 0;
#pragma unroll 1
      while (work.next(segment)) {
        stage = (stage + segment.last - segment.first) % S::kStages;
        if (segment.last < chunks) continue;
        const TilePlace place = place_of(segment.tile);
#pragma unroll 1
        for (int i = 0; i < S::kResultStages; ++i) {
          wait_for_phase(written + stage, parities >> stage & 1);
          parities ^= 1u << stage;
          if (is_elected()) {
#pragma unroll
            for (int j = 0; j < kWarpgroups * S::kPartBytes; j += S::kStoredBytes) {
              const int at = i * S::kPartBytes + j % S::kPartBytes;  // in the warpgroup's results
              const int slice = j / S::kPartBytes * S::kSlices + at / S::kSliceBytes;
              store_tile(y, place.token + at % S::kSliceBytes / kTileRowBytes,
                         place.row + slice * kSliceRows, ring + stage * S::kStageBytes + j);
            }
            commit_stores();
            wait_for_stores<0>();
            for (int to = 0; to < cluster; ++to) arrive_at(to, read + stage, kWarpgroups * 4);
          }
          stage = (stage + 1) % S::kStages;
        }
      }
    }
  } else {
    take_registers<kSumRegisters>();
    const int lane = lane_index();
    wait_for_previous_grid();  // memory to write to may be that kernel's
    const CodePlace place = code_place(0, warp % 4, lane);
    const int first_slice = warpgroup * S::kSlices;
    const int codes_at =
        S::kCodesAt + first_slice * S::kCodeBytes +
        (S::kIs8Bit ? (warp % 4 * 32 + lane) * 4 : place.piece * kPiece + place.offset);
    const int values_at = S::kValuesAt + first_slice * kSliceValueBytes;
    const Operand ring_operand = ring;
    // Where results of one token have the 8 rows that this thread points to.
    const int stored_token = lane / 16 * 8 + lane % 8;
    const int stored_piece = (warp % 4 * 2 + lane / 8 % 2) ^ stored_token % 8;
    const int stored_at =
        warpgroup * S::kPartBytes + stored_token * kTileRowBytes + stored_piece * kPiece;

    float sums[S::kSlices][S::kTokens / 2];
    constexpr int kMetadata = S::kSlices * S::kMetadata;
    std::uint32_t metadata[2][kMetadata] = {};  // of this chunk and of the one before
    int before = 0;                             // the stage whose products may be under way
    Turn turn;
    bool owes_signal = false;
    const auto release = [&](int stage) {  // to all blocks that copy to it
      __syncwarp();                        // every lane has read
      if (lane < cluster) arrive_at(lane, read + stage);
    };
    const auto keep_all = [&](const std::uint32_t (&values)[kMetadata]) {
#pragma unroll
      for (int i = 0; i < kMetadata; ++i) keep(values[i]);
    };
    const auto multiply = [&](bool is_first, int mine) {
      wait_for_phase(landed + turn.stage, turn.parity);
      const Operand tokens = ring_operand + turn.stage * S::kStageBytes, w = tokens + values_at;
      const unsigned char* codes = ring + turn.stage * S::kStageBytes + codes_at;
      std::uint32_t (&of_slices)[kMetadata] = metadata[mine];
#pragma unroll
      for (int i = 0; i < S::kSlices; ++i) {
        if constexpr (S::kIs8Bit) {  // of each product a register, as it lies in its tile
          const unsigned char* of_slice = codes + i * S::kCodeBytes;
          of_slices[2 * i] = *reinterpret_cast<const std::uint32_t*>(of_slice);
          of_slices[2 * i + 1] =
              *reinterpret_cast<const std::uint32_t*>(of_slice + S::kCodeBytes / 2);
        } else {  // one for both products, of which each takes other threads'
          of_slices[i] = metadata_of(codes + i * S::kCodeBytes, lane % 2);
        }
      }
      begin_products();
#pragma unroll
      for (int i = 0; i < S::kSlices; ++i) {
        multiply_add_2to4<typename S::Input, S::kTokens, 0, kValueRowBytes>(
            sums[i], w + i * kSliceValueBytes, tokens, of_slices[i * S::kMetadata], !is_first);
      }
#pragma unroll
      for (int i = 0; i < S::kSlices; ++i) {
        multiply_add_2to4<typename S::Input, S::kTokens, S::kIs8Bit ? 0 : 1, kValueRowBytes>(
            sums[i], w + (i * kSliceValueBytes + 32), tokens + 64,
            of_slices[(i + 1) * S::kMetadata - 1]);
      }
      commit_products();
      wait_for_products<1>();
      keep_all(metadata[1 - mine]);
      if (!is_first) release(before);
      before = turn.stage;
      turn.advance(1, S::kStages);
    };
    // What a warp has summed, 16 bytes of each thread after each other.
    const auto partial_of = [&](int block) {
      return partial +
             static_cast<std::int64_t>(block * kWarpgroups * 4 + warp) * (32 * S::kSums / 4) + lane;
    };
    const auto signal_of = [&](int block) { return signals + block * kWarpgroups * 4 + warp; };

    const auto send_owed_signal = [&] {
      if (owes_signal && lane == 0) send_signal(signal_of(blockIdx.x));
      owes_signal = false;
    };

    while (work.next(segment)) {
      multiply(true, 0);
      send_owed_signal();
      int chunk = segment.first + 1;
      for (; chunk + 1 < segment.last; chunk += 2) {
        multiply(false, 1);
        multiply(false, 0);
      }
      if (chunk < segment.last) multiply(false, 1);

      // While the last products are under way.
      float row_bias[S::kSlices][2] = {}, row_scale[S::kSlices][2] = {};
      if (S::kIs8Bit || bias != nullptr) {
        const int row = place_of(segment.tile).row;
#pragma unroll
        for (int i = 0; i < 2 * S::kSlices; ++i) {
          const int slice = first_slice + i / 2;
          const int n = row + slice * kSliceRows + warp % 4 * 16 + lane / 4 + i % 2 * 8;
          if (n >= N) continue;
          if (bias != nullptr) row_bias[i / 2][i % 2] = to_float(bias[n]);
          if constexpr (S::kIs8Bit) row_scale[i / 2][i % 2] = row_scales[n];
        }
      }
      wait_for_products<0>();
      keep_all(metadata[0]);
      keep_all(metadata[1]);
      release(before);

      if (segment.last < chunks) {  // the rest is another's, who waits for this
        float4* to = partial_of(blockIdx.x);
#pragma unroll
        for (int i = 0; i < S::kSums; i += 4) {
          const float* sum = &sums[i / (S::kTokens / 2)][i % (S::kTokens / 2)];
          to[8 * i] = {sum[0], sum[1], sum[2], sum[3]};
        }
        __syncwarp();
        owes_signal = true;
        continue;
      }
      for (int other = me, begin = segment.first; begin > 0;) {
        --other;
        begin = shared_begin(other) - segment.tile * chunks;
        const int block = other * cluster + part;
        if (lane == 0) wait_for_signal(signal_of(block));
        __syncwarp();
        const float4* from = partial_of(block);
#pragma unroll
        for (int first = 0; first < S::kSums / 4; first += S::kLoads) {
          float4 added[S::kLoads];
#pragma unroll
          for (int i = 0; i < S::kLoads; ++i) added[i] = load_signalled(from + 32 * (first + i));
#pragma unroll
          for (int i = 0; i < S::kLoads; ++i) {
            const int at = 4 * (first + i);
            float* sum = &sums[at / (S::kTokens / 2)][at % (S::kTokens / 2)];
            sum[0] += added[i].x;
            sum[1] += added[i].y;
            sum[2] += added[i].z;
            sum[3] += added[i].w;
          }
        }
      }

      if constexpr (S::kIs8Bit) {
        const int token = place_of(segment.tile).token + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < S::kTokens / 4; ++i) {  // every other token of four
          const int m = token + i / 2 * 8 + i % 2;
          const float scale = m < M ? token_scales[m] : 0.0f;
#pragma unroll
          for (int slice = 0; slice < S::kSlices; ++slice) {
            float* sum = &sums[slice][i / 2 * 4 + i % 2];
            sum[0] *= scale * row_scale[slice][0];
            sum[2] *= scale * row_scale[slice][1];
          }
        }
      }
      if (bias != nullptr) {
#pragma unroll
        for (int i = 0; i < S::kSums; ++i) {
          const int slice = i / (S::kTokens / 2);
          sums[slice][i % (S::kTokens / 2)] += row_bias[slice][i / 2 % 2];
        }
      }
#pragma unroll
      for (int i = 0; i < S::kResultStages; ++i) {
        wait_for_phase(landed + turn.stage, turn.parity);
        unsigned char* to = ring + turn.stage * S::kStageBytes + stored_at;
#pragma unroll
        for (int j = 0; j < S::kPartBytes; j += 16 * kTileRowBytes) {
          const int at = (i * S::kPartBytes + j) / kTileRowBytes;
          std::uint32_t fragment[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float* sum = &sums[at / S::kTokens][at % S::kTokens / 2 + k / 2 * 4 + k % 2 * 2];
            fragment[k] = round_pair<T>(sum[0], sum[1]);
          }
          store_transposed(to + j, fragment);
        }
        show_to_stores();
        __syncwarp();
        if (lane == 0) arrive(written + turn.stage);
        turn.advance(1, S::kStages);
      }
    }
    send_owed_signal();
  }
  __syncwarp();
  // A block's memory must outlive what the other one copies to it and arrives at.
  if (cluster > 1) synchronize_cluster();
}

template <typename S>
const char* launch(const PrefillCall& call, int index, const Device& device, const Plan& plan) {
  using T = typename S::T;
  const int cluster = plan.layout.cluster;
  const int share = S::kTokens / cluster;  // of a tile's tokens, that a block copies for all
  TileMap x, values, y;
  // Two numbers of 8 bits are copied as one of 16: bytes are bytes.
  const int columns = call.in_features / S::kPerWord;
  const char* error = describe_tiles(&x, call.x, call.tokens, columns, call.x_stride / S::kPerWord,
                                     share, call.is_bfloat16);
  if (error == nullptr) {
    error = describe_tiles(&values, call.values, call.out_features, columns / 2, columns / 2,
                           S::kRows, call.is_bfloat16, kValueRowBytes);
  }
  if (error == nullptr) {
    error = describe_tiles(&y, call.y, call.tokens, call.out_features, call.out_features,
                           S::kStoredTokens, call.is_bfloat16);
  }
  if (error != nullptr) return error;
  return launch_kernel<S>(
      sparse_linear_prefill_kernel<S>, call, device, index, plan.clusters * cluster, cluster,
      S::kThreads, S::kSharedBytes, x, values, y, static_cast<const std::uint8_t*>(call.codes),
      static_cast<const T*>(call.bias), call.row_scales, call.token_scales, call.tokens,
      call.out_features, call.in_features, plan.tiles, plan.shared_tiles, plan.extra, cluster,
      plan.clusters, share, static_cast<float4*>(call.workspace), call.signals);
}

template <typename T, typename Input>
const char* launch_layout(const PrefillCall& call, int index, const Device& device,
                          const Plan& plan) {
  const int rows = plan.layout.rows, tokens = plan.layout.tokens;
  if constexpr (!std::is_same_v<Input, Fp8>) {
    if (rows == 256) return launch<Shape<T, 256, 192>>(call, index, device, plan);
    if (tokens == 96) return launch<Shape<T, 128, 96>>(call, index, device, plan);
    if (tokens == 160) return launch<Shape<T, 128, 160>>(call, index, device, plan);
    if (tokens == 192) return launch<Shape<T, 128, 192>>(call, index, device, plan);
  }
  if (tokens == 64) return launch<Shape<T, 128, 64, Input>>(call, index, device, plan);
  if (tokens == 128) return launch<Shape<T, 128, 128, Input>>(call, index, device, plan);
  return launch<Shape<T, 128, 256, Input>>(call, index, device, plan);
}

template <typename T>
const char* launch_type(const PrefillCall& call, int index, const Device& device,
                        const Plan& plan) {
  return call.is_fp8 ? launch_layout<T, Fp8>(call, index, device, plan)
                     : launch_layout<T, T>(call, index, device, plan);
}

}  // namespace

const char* sparse_linear_prefill(const PrefillCall& call, std::size_t& needed_bytes) {
  needed_bytes = 0;
  if (call.tokens < 1) return "at least one token is needed";
  if (call.in_features < kStep || call.in_features % kStep != 0) {
    return "in_features must be a multiple of 64";
  }
  if (call.is_fp8 && call.in_features % (2 * kStep) != 0) {
    return "with numbers of 8 bits in_features must be a multiple of 128";
  }
  if (call.is_fp8 && (call.row_scales == nullptr || call.token_scales == nullptr)) {
    return "numbers of 8 bits need scales of rows and tokens";
  }
  if (call.out_features < 8 || call.out_features % 8 != 0) {
    return "out_features must be a multiple of 8";
  }
  const auto misaligned = [](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % kPiece != 0;
  };
  if (misaligned(call.x) || misaligned(call.values) || misaligned(call.codes) ||
      misaligned(call.y) || misaligned(call.workspace) ||
      call.x_stride % (call.is_fp8 ? 16 : 8) != 0) {
    return "x, its rows, values, codes, y and the workspace must be aligned to 16 bytes";
  }
  int index = 0;
  const Device* device = current_device(index);
  if (device == nullptr) return "the attributes of the current device cannot be read";
  if (device->major != 9) return "compute capability 9.0 is needed";
  const Plan plan = make_plan(call, *device);
  if (plan.clusters == 0) return "there is no such layout";
  if (call.workspace_bytes < plan.workspace_bytes()) {
    needed_bytes = plan.workspace_bytes();
    return nullptr;
  }
  return call.is_bfloat16 ? launch_type<__nv_bfloat16>(call, index, *device, plan)
                          : launch_type<__half>(call, index, *device, plan);
}

}  // namespace proxsparse
