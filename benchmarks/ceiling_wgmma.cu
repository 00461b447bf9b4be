// How fast Hopper's tensor cores multiply by a 2:4 matrix when they, and the copies that feed them,
// share a memory of 128 bytes a clock. See bench_prefill_ceiling.py.
//
// Every case is the main loop of a matrix product, y[rows, 256] += w[rows, k] x[256, k]^T, run for
// millions of columns on all multiprocessors: with both operands at rest in shared memory
// ("products"), with nothing but the copies of a real loop ("copies"), and with both. 64 columns
// are a stage of the ring. The operands lie in device memory as they shall lie in shared memory, so
// that copies are plain runs of bytes; all fit into the L2 cache.
//
// Each case is first checked against the host on small integers, of which every sum is exact.
//
// Prints CSV. "clocks" are those of one product of 64 rows and 256 tokens, 16 columns of a dense
// weight or 32 of a sparse one, which takes 128 at the peak; of copies alone, the same per product
// that they could feed. Bytes are per clock and multiprocessor: what products and metadata read
// from shared memory and copies write to it; what is asked of the L2 cache.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <type_traits>
#include <vector>

#include "hopper.h"
#include "ptx.h"

namespace proxsparse {
namespace {

constexpr int kColumns = 64, kTokens = 256, kPeakClocks = 128;
constexpr int kDepth = 64;  // stages after which sums begin anew, as those of 4096 columns do

// The operands in device memory: of a stage all groups of 64 rows, all tiles of 256 tokens.
constexpr int kChunks = 16, kRowTiles = 12, kTokenTiles = 12, kRowGroups = 3 * kRowTiles;

enum class Weight { kDense, kSparse, kSparseInRegisters };
enum class Work { kProducts, kCopies, kBoth };

template <Weight weight, int warpgroups, Work work, int cluster = 1>
struct Case {
  static constexpr Weight kWeight = weight;
  static constexpr bool kIsDense = weight == Weight::kDense;
  static constexpr bool kInRegisters = weight == Weight::kSparseInRegisters;
  static constexpr bool kMultiplies = work != Work::kCopies, kCopies = work != Work::kProducts;
  static constexpr int kCluster = cluster;  // blocks that share their tokens
  static constexpr int kWarpgroups = warpgroups, kRows = 64 * warpgroups;
  static constexpr int kThreads = 128 * warpgroups;
  static constexpr int kProducts = kColumns / (kIsDense ? 16 : 32);  // of a stage and 64 rows
  // Of a stage: tokens, then of every 64 rows the values, then the metadata.
  static constexpr int kTokenBytes = kTokens * kTileRowBytes;
  static constexpr int kRowBytes = kIsDense ? kTileRowBytes : kTileRowBytes / 2;
  static constexpr int kValueBytes = 64 * kRowBytes;
  static constexpr int kMetadataBytes = kIsDense ? 0 : 64 * kColumns / 8;
  static constexpr int kMetadataAt = kTokenBytes + warpgroups * kValueBytes;
  static constexpr int kBytes = kMetadataAt + warpgroups * kMetadataBytes;
  static constexpr int kStageBytes =
      (kBytes + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
  static constexpr int kStagesAt = 1024;  // before them, two barriers for each
  static constexpr int kStages = (227 * 1024 - kStagesAt) / kStageBytes;
  static constexpr int kSharedBytes = kStagesAt + kStages * kStageBytes;

  // Of a stage, in all; every warpgroup reads all tokens.
  static constexpr int kOwnBytes = kInRegisters ? 0 : kValueBytes + kMetadataBytes;
  static constexpr int kRead = kMultiplies ? warpgroups * (kTokenBytes + kOwnBytes) : 0;
  static constexpr int kWritten = kCopies ? kBytes : 0;
  static constexpr int kFetched = kCopies ? kBytes - kTokenBytes + kTokenBytes / cluster : 0;
};

struct Operands {
  const unsigned char *values, *metadata, *tokens;
};

struct Span {
  long long begin, end;  // clocks
};

// To the same place of all blocks of the cluster, whose barriers count the bytes.
__device__ __forceinline__ void copy_bytes_to_cluster(void* to, const void* from, int bytes,
                                                      Barrier* barrier, std::uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

#define TEN(tens)                                                                         \
  "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens \
  "6, %" #tens "7, %" #tens "8, %" #tens "9, "
#define SUMS                                                                       \
  "{" TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) \
      TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127}"
#define SUMS4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define SUMS16(i) SUMS4(i), SUMS4(i + 4), SUMS4(i + 8), SUMS4(i + 12)
#define SUMS64(i) SUMS16(i), SUMS16(i + 16), SUMS16(i + 32), SUMS16(i + 48)
#define MULTIPLY(INSTRUCTION, OPERANDS, ADDS, ...)                                                 \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS ", 0;\nwgmma.mma_async." INSTRUCTION \
               ".f32.bf16.bf16 " SUMS ", " OPERANDS ";\n}"                                         \
               : SUMS64(0), SUMS64(64)                                                             \
               : __VA_ARGS__)

// Begins product `kIndex` of a stage, of 64 rows; replaces the sums unless `adds`.
template <typename C, int kIndex>
__device__ __forceinline__ void multiply(float (&sum)[kTokens / 2], const unsigned char* values,
                                         const std::uint32_t (&in_registers)[4],
                                         const unsigned char* tokens, std::uint32_t metadata,
                                         int adds) {
  const std::uint64_t x = tile_descriptor(tokens + kIndex * (C::kIsDense ? 32 : 64));
  const unsigned char* w = values + kIndex * 32;
  if constexpr (C::kIsDense) {
    MULTIPLY("sync.aligned.m64n256k16", "%128, %129, adds, 1, 1, 0, 0", "%130",
             "l"(tile_descriptor(w)), "l"(x), "r"(adds));
  } else if constexpr (C::kInRegisters) {
    MULTIPLY("sp.sync.aligned.m64n256k32",
             "{%128, %129, %130, %131}, %132, %133, %134, adds, 1, 1, 0", "%135",
             "r"(in_registers[0]), "r"(in_registers[1]), "r"(in_registers[2]), "r"(in_registers[3]),
             "l"(x), "r"(metadata), "n"(kIndex), "r"(adds));
  } else {
    MULTIPLY("sp.sync.aligned.m64n256k32", "%128, %129, %130, %131, adds, 1, 1, 0, 0", "%132",
             "l"(tile_descriptor<kTileRowBytes / 2>(w)), "l"(x), "r"(metadata), "n"(kIndex),
             "r"(adds));
  }
}

#undef MULTIPLY
#undef SUMS64
#undef SUMS16
#undef SUMS4
#undef SUMS
#undef TEN

// Where in the ring a stage is, and the parity of its turn.
struct Turn {
  int stage = 0;
  unsigned parity = 0;

  __device__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    main_loop(Operands operands, int stages, Span* spans, float* y) {
  unsigned char* shared = dynamic_shared_memory();
  const int thread = threadIdx.x, lane = thread % 32, warpgroup = thread / 128;
  const int row_tile = blockIdx.x % kRowTiles, token_tile = blockIdx.x / kRowTiles % kTokenTiles;
  Barrier* landed = reinterpret_cast<Barrier*>(shared);
  Barrier* read = landed + C::kStages;
  unsigned char* ring = shared + C::kStagesAt;
  const auto meet = [] {
    __syncwarp();
    if constexpr (C::kCluster == 1) {
      __syncthreads();
    } else {
      synchronize_cluster();
    }
  };
  if (thread == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      make_barrier(landed + i, 1);
      make_barrier(read + i, C::kCluster * C::kThreads / 32);
    }
    show_barriers();
  }
  meet();

  const auto fetch = [&](int i, int to) {
    constexpr int kPart = C::kTokenBytes / C::kCluster;
    const int part = blockIdx.x % C::kCluster * kPart;
    const int chunk = i % kChunks, group = chunk * kRowGroups + row_tile * C::kWarpgroups;
    const unsigned char* tokens =
        operands.tokens + (chunk * kTokenTiles + token_tile) * C::kTokenBytes + part;
    unsigned char* stage = ring + to * C::kStageBytes;
    Barrier* barrier = landed + to;
    arrive_and_expect(barrier, C::kBytes);
    if constexpr (C::kCluster == 1) {
      copy_bytes(stage, tokens, kPart, barrier);
    } else {
      copy_bytes_to_cluster(stage + part, tokens, kPart, barrier, (1 << C::kCluster) - 1);
    }
    copy_bytes(stage + C::kTokenBytes, operands.values + group * C::kValueBytes,
               C::kWarpgroups * C::kValueBytes, barrier);
    if constexpr (!C::kIsDense) {
      copy_bytes(stage + C::kMetadataAt, operands.metadata + group * C::kMetadataBytes,
                 C::kWarpgroups * C::kMetadataBytes, barrier);
    }
  };
  const auto load_metadata = [&](const unsigned char* stage) {
    return *reinterpret_cast<const std::uint32_t*>(stage + C::kMetadataAt + thread * 4);
  };
  const auto release = [&](int stage) {
    if constexpr (C::kCluster == 1) {
      if (lane == 0) arrive(read + stage);
    } else {
      if (lane < C::kCluster) arrive_at(lane, read + stage);
    }
  };

  if (thread == 0) {
    for (int i = 0; i < C::kStages; ++i) fetch(i, i);
  }
  __syncwarp();
  float sum[kTokens / 2] = {};
  std::uint32_t in_registers[C::kProducts][4] = {};
  std::uint32_t metadata[2] = {};   // of this stage and of the one before
  if constexpr (C::kInRegisters) {  // those of the first stage, all the time
    wait_for_phase(landed, 0);
    metadata[0] = metadata[1] = load_metadata(ring);
    const int row = thread / 32 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < C::kProducts; ++j) {
      const int piece = (j * 2 + lane / 16) ^ (row / 2 % 4);
      load_matrices(in_registers[j], ring + C::kTokenBytes + row * C::kRowBytes + piece * kPiece);
    }
  }
  Turn turn, refill;
  int before = 0;  // the stage whose products may be under way
  const auto step = [&](int i, std::uint32_t& mine, std::uint32_t& previous) {
    if (C::kCopies || i < C::kStages) wait_for_phase(landed + turn.stage, turn.parity);
    __syncwarp();
    if constexpr (C::kMultiplies) {
      const unsigned char* stage = ring + turn.stage * C::kStageBytes;
      const unsigned char* values = stage + C::kTokenBytes + warpgroup * C::kValueBytes;
      if constexpr (C::kWeight == Weight::kSparse) mine = load_metadata(stage);
      begin_products();
      multiply<C, 0>(sum, values, in_registers[0], stage, mine, i % kDepth);
      multiply<C, 1>(sum, values, in_registers[1], stage, mine, 1);
      if constexpr (C::kProducts == 4) {
        multiply<C, 2>(sum, values, in_registers[2], stage, mine, 1);
        multiply<C, 3>(sum, values, in_registers[3], stage, mine, 1);
      }
      commit_products();
    }
    // No warp of its own asks for copies: with more than twelve warps a thread could have no more
    // than 128 registers, which is what the sums take. Into the stage before the previous, of which
    // the products are done, or are about to be in the other warpgroups.
    if (C::kCopies && thread == 0 && i > 1 && i - 2 + C::kStages < stages) {
      wait_for_phase(read + refill.stage, refill.parity);
      fetch(i - 2 + C::kStages, refill.stage);
      refill.advance(C::kStages);
    }
    __syncwarp();
    if constexpr (C::kMultiplies) {
      wait_for_products<1>();
      keep(previous);
    }
    if (C::kCopies && i > 0) release(before);
    before = turn.stage;
    turn.advance(C::kStages);
  };
  const long long begin = clock64();
  for (int i = 0; i < stages; i += 2) {
    step(i, metadata[0], metadata[1]);
    step(i + 1, metadata[1], metadata[0]);
  }
  wait_for_products<0>();
  keep(metadata[1]);
  if (thread % 128 == 0) spans[blockIdx.x * C::kWarpgroups + warpgroup] = {begin, clock64()};
  if (y != nullptr) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int row = thread / 32 * 16 + lane / 4 + i % 4 / 2 * 8;
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
      y[(static_cast<std::int64_t>(blockIdx.x) * C::kRows + row) * kTokens + token] = sum[i];
    }
  }
  meet();  // a block's barriers must outlive the arrivals of the other
}

void require(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(2);
}

template <typename T>
T* to_device(const std::vector<T>& host) {
  T* device = nullptr;
  require(cudaMalloc(&device, host.size() * sizeof(T)));
  require(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

// Random operands: as the host reads them, and on the device as products read them.
struct Data {
  // [chunk, group of 64 rows, row, column] and [chunk, tile, column, token].
  std::vector<float> dense, sparse, tokens;
  Operands on_device_dense, on_device_sparse;

  template <typename Draw>
  explicit Data(Draw&& draw) {
    constexpr int kTile = 64 * kColumns, kWeights = kChunks * kRowGroups * kTile;
    constexpr int kWords = 128;  // of metadata, for 64 rows
    dense.resize(kWeights);
    sparse.resize(kWeights);
    tokens.resize(kChunks * kTokenTiles * kTokens * kColumns);
    std::vector<__nv_bfloat16> dense_image(kWeights), sparse_image(kWeights / 2);
    std::vector<__nv_bfloat16> tokens_image(tokens.size());
    std::vector<std::uint32_t> metadata(kChunks * kRowGroups * kWords);
    std::mt19937 random(1);
    const auto put = [&](std::vector<__nv_bfloat16>& image, int tile, int row, int column,
                         int columns) {
      const __nv_bfloat16 value = __float2bfloat16_rn(draw(random));
      const int byte = (row * columns + column) * 2, pieces = columns / 8;
      image[tile + (byte ^ (byte / kTileRowBytes % pieces * kPiece)) / 2] = value;
      return __bfloat162float(value);
    };
    for (int i = 0; i < kWeights; ++i) {
      dense[i] = put(dense_image, i / kTile * kTile, i % kTile / kColumns, i % kColumns, kColumns);
    }
    for (int i = 0; i < kWeights; i += 4) {  // two of four columns, and a thread's word names them
      const int row = i % kTile / kColumns, column = i % kColumns, first = random() % 3;
      const int kept[] = {first, first + 1 + static_cast<int>(random() % (3 - first))};
      for (int j = 0; j < 2; ++j) {
        sparse[i + kept[j]] =
            put(sparse_image, i / kTile * kTile / 2, row, column / 2 + j, kColumns / 2);
      }
      const int thread = row / 16 * 32 + row % 8 * 4 + column / 16;
      metadata[i / kTile * kWords + thread] |= (kept[0] | kept[1] << 2)
                                               << (row % 16 / 8 * 16 + column % 16);
    }
    for (int i = 0; i < static_cast<int>(tokens.size()); ++i) {
      constexpr int kSize = kTokens * kColumns;
      tokens[i] = put(tokens_image, i / kSize * kSize, i % kTokens, i % kSize / kTokens, kColumns);
    }
    const auto* words = reinterpret_cast<unsigned char*>(to_device(metadata));
    const auto* x = reinterpret_cast<unsigned char*>(to_device(tokens_image));
    on_device_dense = {reinterpret_cast<unsigned char*>(to_device(dense_image)), words, x};
    on_device_sparse = {reinterpret_cast<unsigned char*>(to_device(sparse_image)), words, x};
  }

  // What a block's sums must be after so many stages.
  template <typename C>
  std::vector<float> sums(int block, int stages) const {
    std::vector<float> y(C::kRows * kTokens);
    const int row_tile = block % kRowTiles, token_tile = block / kRowTiles % kTokenTiles;
    for (int i = (stages - 1) / kDepth * kDepth; i < stages; ++i) {
      const int chunk = C::kCopies ? i % kChunks : i % C::kStages;
      const int group = (C::kInRegisters ? 0 : chunk) * kRowGroups + row_tile * C::kWarpgroups;
      const float* w = (C::kIsDense ? dense : sparse).data() + group * 64 * kColumns;
      const float* x = tokens.data() + (chunk * kTokenTiles + token_tile) * kTokens * kColumns;
      for (int j = 0; j < C::kRows * kColumns; ++j) {
        if (w[j] == 0.0f) continue;
        float* to = y.data() + j / kColumns * kTokens;
        const float* from = x + j % kColumns * kTokens;
        for (int token = 0; token < kTokens; ++token) to[token] += w[j] * from[token];
      }
    }
    return y;
  }
};

struct Result {
  double clocks, seconds, megahertz, teraflops;
};

class Bench {
 public:
  Bench(const Data& integers, const Data& normals) : integers_(integers), normals_(normals) {
    require(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, 0));
    require(cudaMalloc(&spans_, 3 * multiprocessors_ * sizeof(Span)));
    require(cudaMalloc(&y_, 3 * 64 * kTokens * multiprocessors_ * sizeof(float)));
    require(cudaEventCreate(&before_));
    require(cudaEventCreate(&after_));
    std::puts(
        "case,rows,cluster,sums,clocks,pct_of_peak,shared_bytes_per_clock,l2_bytes_per_clock,"
        "tflops,mhz,sustained_clocks,sustained_tflops,sustained_mhz");
  }

  // One line of the table; whether the sums were right.
  template <typename C>
  bool run() {
    require(cudaFuncSetAttribute(main_loop<C>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 C::kSharedBytes));
    int clusters = 0;
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = configure<C>(C::kCluster, &attribute);
    require(cudaOccupancyMaxActiveClusters(&clusters, main_loop<C>, &config));
    blocks_ = std::min(clusters * C::kCluster, multiprocessors_);
    const bool is_right = !C::kMultiplies || check<C>();
    constexpr double kClockRate = 1.7e9;  // about
    constexpr int kStageClocks = kPeakClocks * C::kProducts * C::kWarpgroups;
    const int few = static_cast<int>(3e-3 * kClockRate / kStageClocks) / 2 * 2;
    launch<C>(normals_, few, nullptr);
    Result burst = launch<C>(normals_, few, nullptr);
    for (int i = 0; i < 2; ++i) {
      const Result again = launch<C>(normals_, few, nullptr);
      if (again.seconds < burst.seconds) burst = again;
    }
    // The first of the two long ones lets the power limit act.
    const int many = static_cast<int>(0.25 / burst.seconds * few) / 2 * 2;
    launch<C>(normals_, many, nullptr);
    const Result sustained = launch<C>(normals_, many, nullptr);
    const char* sums = !C::kMultiplies ? "none" : is_right ? "right" : "wrong";
    const double stage_clocks = burst.clocks * C::kProducts * C::kWarpgroups;
    std::printf("%s,%d,%d,%s,%.1f,%.1f,%.1f,%.1f,%.0f,%.0f,%.1f,%.0f,%.0f\n", name<C>(), C::kRows,
                C::kCluster, sums, burst.clocks, 100 * kPeakClocks / burst.clocks,
                (C::kRead + C::kWritten) / stage_clocks, C::kFetched / stage_clocks,
                burst.teraflops, burst.megahertz, sustained.clocks, sustained.teraflops,
                sustained.megahertz);
    std::fflush(stdout);
    return is_right;
  }

 private:
  template <typename C>
  static const char* name() {
    constexpr const char* kWeights[] = {"dense", "sparse", "sparse in registers"};
    static char text[64];
    std::snprintf(text, sizeof(text), "%s: %s", kWeights[static_cast<int>(C::kWeight)],
                  !C::kCopies       ? "products"
                  : !C::kMultiplies ? "copies"
                                    : "products and copies");
    return text;
  }

  template <typename C>
  static cudaLaunchConfig_t configure(int blocks, cudaLaunchAttribute* cluster) {
    cluster->id = cudaLaunchAttributeClusterDimension;
    cluster->val.clusterDim = {C::kCluster, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = C::kThreads;
    config.dynamicSmemBytes = C::kSharedBytes;
    config.attrs = cluster;
    config.numAttrs = 1;
    return config;
  }

  template <typename C>
  Result launch(const Data& data, int stages, float* y) {
    cudaLaunchAttribute cluster;
    const cudaLaunchConfig_t config = configure<C>(blocks_, &cluster);
    require(cudaEventRecord(before_));
    require(cudaLaunchKernelEx(&config, main_loop<C>,
                               C::kIsDense ? data.on_device_dense : data.on_device_sparse, stages,
                               spans_, y));
    require(cudaEventRecord(after_));
    require(cudaDeviceSynchronize());
    float milliseconds = 0.0f;
    require(cudaEventElapsedTime(&milliseconds, before_, after_));
    std::vector<Span> spans(blocks_ * C::kWarpgroups);
    require(cudaMemcpy(spans.data(), spans_, spans.size() * sizeof(Span), cudaMemcpyDeviceToHost));
    std::vector<double> clocks(blocks_);  // from the first warpgroup's begin to the last one's end
    for (int i = 0; i < blocks_; ++i) {
      Span all = spans[i * C::kWarpgroups];
      for (int j = 1; j < C::kWarpgroups; ++j) {
        const Span& one = spans[i * C::kWarpgroups + j];
        all = {std::min(all.begin, one.begin), std::max(all.end, one.end)};
      }
      clocks[i] = static_cast<double>(all.end - all.begin);
    }
    std::nth_element(clocks.begin(), clocks.begin() + blocks_ / 2, clocks.end());
    const double median = clocks[blocks_ / 2], seconds = milliseconds * 1e-3;
    const double work = 2.0 * C::kRows * kTokens * kColumns * stages * blocks_;
    return {median / stages / (C::kProducts * C::kWarpgroups), seconds, median / seconds * 1e-6,
            work / seconds * 1e-12};
  }

  // Long enough for several turns of the ring and for the sums to begin anew.
  template <typename C>
  bool check() {
    constexpr int kStages = kDepth + 20;
    launch<C>(integers_, kStages, y_);
    std::vector<float> found(C::kRows * kTokens);
    for (const int block : {0, blocks_ - 1}) {
      require(cudaMemcpy(found.data(), y_ + static_cast<std::int64_t>(block) * found.size(),
                         found.size() * sizeof(float), cudaMemcpyDeviceToHost));
      if (found != integers_.sums<C>(block, kStages)) return false;
    }
    return true;
  }

  const Data &integers_, &normals_;
  int multiprocessors_ = 0, blocks_ = 0;
  Span* spans_ = nullptr;
  float* y_ = nullptr;
  cudaEvent_t before_, after_;
};

int measure() {
  const Data integers([](std::mt19937& random) { return static_cast<float>(random() % 7) - 3; });
  const Data normals([normal = std::normal_distribution<float>()](std::mt19937& random) mutable {
    return normal(random);
  });
  Bench bench(integers, normals);
  constexpr Weight kDense = Weight::kDense, kSparse = Weight::kSparse;
  constexpr Work kProducts = Work::kProducts, kCopies = Work::kCopies, kBoth = Work::kBoth;
  const bool right[] = {
      bench.run<Case<kDense, 2, kProducts>>(),
      bench.run<Case<kDense, 2, kCopies>>(),
      bench.run<Case<kDense, 2, kBoth>>(),
      bench.run<Case<kDense, 2, kBoth, 2>>(),
      bench.run<Case<Weight::kSparseInRegisters, 2, kProducts>>(),
      bench.run<Case<kSparse, 1, kProducts>>(),
      bench.run<Case<kSparse, 2, kProducts>>(),
      bench.run<Case<kSparse, 3, kProducts>>(),
      bench.run<Case<kSparse, 2, kCopies>>(),
      bench.run<Case<kSparse, 2, kCopies, 2>>(),
      bench.run<Case<kSparse, 3, kCopies>>(),
      bench.run<Case<kSparse, 3, kCopies, 2>>(),
      bench.run<Case<kSparse, 2, kBoth>>(),
      bench.run<Case<kSparse, 2, kBoth, 2>>(),
      bench.run<Case<kSparse, 3, kBoth>>(),
      bench.run<Case<kSparse, 3, kBoth, 2>>(),
  };
  return std::all_of(std::begin(right), std::end(right), [](bool is) { return is; }) ? 0 : 1;
}

}  // namespace
}  // namespace proxsparse

int main() { return proxsparse::measure(); }
