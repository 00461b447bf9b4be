// How the kernel for many tokens lays out a product: its tiles, and who computes them; see
// sparse_linear_prefill_hopper.cu.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "packed_weight.h"
#include "sparse_linear_prefill.h"

namespace proxsparse {

constexpr int kBand = 8;  // token tiles that are walked together, see `Tiles`

// Where a tile begins: its row and token, as `Tiles` gives them in units of tiles.
struct TilePlace {
  int row, token;
};

// The tiles of the result. They run along the rows in bands of a few token tiles, so that what runs
// together shares both operands in the L2 cache about evenly.
struct Tiles {
  int row_tiles, token_tiles;  // row tiles of a whole cluster

  __host__ __device__ int count() const { return row_tiles * token_tiles; }

  __device__ TilePlace operator[](int index) const {
    const int band = index / (row_tiles * kBand), in_band = index % (row_tiles * kBand);
    const int width = min(kBand, token_tiles - band * kBand);
    return {in_band / width, band * kBand + in_band % width};
  }
};

// How a product is laid out: tiles, the clusters that compute them, and how many tiles they share.
struct Plan {
  PrefillLayout layout;
  Tiles tiles;
  int clusters = 0, shared_tiles = 0;
  int extra = 0;  // chunks, see `Work`

  std::size_t workspace_bytes() const {
    if (shared_tiles == 0) return 0;
    return std::size_t{4} * layout.rows * layout.tokens * clusters * layout.cluster;
  }
};

// The layouts, and about how many clocks a stage takes. These constants are fitted to ten weights
// and six token counts on an H200, where the plan takes 1 % longer than the best layout does.
struct Candidate {
  PrefillLayout layout;
  double clocks;
};
// Those of 96, 160 and 192 tokens, behind the first eight, are fitted to eight weights and nine
// token counts on an H100, and are for fewer tokens than this unless they are asked for.
constexpr int kFirstCandidates = 8, kManyTokens = 1024;
constexpr Candidate kCandidates[] = {
    {{256, 192, 2}, 990}, {{256, 192, 1}, 980}, {{128, 256, 2}, 645}, {{128, 256, 1}, 780},
    {{128, 128, 2}, 395}, {{128, 128, 1}, 470}, {{128, 64, 2}, 305},  {{128, 64, 1}, 300},
    {{128, 192, 2}, 495}, {{128, 192, 1}, 625}, {{128, 160, 2}, 460}, {{128, 160, 1}, 440},
    {{128, 96, 2}, 400},  {{128, 96, 1}, 310},
};
// To store results; for a sum that is passed on, to write it, and to wait for it and add it.
constexpr double kTileClocks = 100, kPartClocks = 5000, kAddClocks = 4000;
constexpr double kExtraClocks = 3300;  // of kPartClocks, which the last part of a tile can work on

// The plan with the least time.
inline Plan make_plan(const PrefillCall& call, const Device& device) {
  const auto divide = [](int n, int by) { return (n + by - 1) / by; };
  const auto fits = [](int asked, int value) { return asked == 0 || asked == value; };
  const int chunks = call.in_features / (call.is_fp8 ? 2 * kStep : kStep);
  Plan best;
  double least = 0;
  const auto consider = [&](double clocks, const Plan& plan) {
    if (best.clusters != 0 && clocks >= least) return;
    best = plan;
    least = clocks;
  };
  const auto consider_layout = [&](const PrefillLayout& layout, double clocks) {
    if (!fits(call.layout.rows, layout.rows) || !fits(call.layout.tokens, layout.tokens) ||
        !fits(call.layout.cluster, layout.cluster)) {
      return;
    }
    // In FP8 those that were built; with twice the metadata, 256 rows leave too few registers.
    const bool is_built = layout.rows == 128 && (layout.tokens & (layout.tokens - 1)) == 0;
    if (call.is_fp8 && !is_built) return;
    const Tiles tiles = {divide(call.out_features, layout.rows * layout.cluster),
                         divide(call.tokens, layout.tokens)};
    const int count = tiles.count(), most = std::max(device.multiprocessors / layout.cluster, 1);
    const double whole = chunks * clocks + kTileClocks;
    consider(divide(count, most) * whole, {layout, tiles, std::min(count, most), 0});
    if (call.signals == nullptr || count % most == 0) return;
    if (count > most) {
      const int shared = most + count % most;
      consider((count / most - 1) * whole + divide(shared * chunks, most) * clocks +
                   2 * kTileClocks + kPartClocks + kAddClocks,
               {layout, tiles, most, shared});
      return;
    }
    for (int parts = 2; parts <= 8 && parts <= chunks; ++parts) {
      const int clusters = std::min(count * parts, most);
      const int extra = clusters % count == 0
                            ? std::min(static_cast<int>(kExtraClocks / clocks), chunks - parts)
                            : 0;
      consider(divide(count * chunks, clusters) * clocks + kTileClocks + kPartClocks +
                   (divide(clusters, count) - 1) * kAddClocks,
               {layout, tiles, clusters, count, extra});
      if (clusters == most) break;
    }
  };
  const bool is_asked = call.layout.tokens != 0;
  int left = kFirstCandidates;
  for (const auto& [layout, clocks] : kCandidates) {
    if (left-- > 0 || is_asked || call.tokens < kManyTokens) consider_layout(layout, clocks);
  }
  return best;
}

}  // namespace proxsparse
