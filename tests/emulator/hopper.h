// The functions of csrc/cuda/hopper.h on the emulator. Products happen as late as they may, which
// is after early copies for the next chunk; and, where copies are late and warps take turns, at
// once.
#pragma once

#include <cstdint>
#include <map>

#include "ptx.h"

#define __grid_constant__

namespace proxsparse {

constexpr int kTileRowBytes = 128, kTileAlignment = 1024;

struct TileMap {
  const unsigned char* data;
  std::int64_t rows, columns, row_stride;
  int tile_rows;
};

inline const char* describe_tiles(TileMap* map, const void* data, std::int64_t rows,
                                  std::int64_t columns, std::int64_t row_stride, int tile_rows,
                                  bool) {
  *map = {static_cast<const unsigned char*>(data), rows, columns, row_stride, tile_rows};
  return nullptr;
}

using Barrier = std::uint64_t;

struct BarrierState {
  int size = 0, missing = 0, missing_bytes = 0;
  unsigned phase = 0;
  std::vector<emulator::Copy> copies;  // that have not landed
  int copied_bytes = 0;
};
inline std::map<const Barrier*, BarrierState> barriers;

inline void make_barrier(Barrier* barrier, int arrivals) {
  barriers[barrier] = {};
  barriers[barrier].size = barriers[barrier].missing = arrivals;
}

inline void show_barriers() {}

// Ends the phase if everything that was announced has come.
inline void look_at(BarrierState& state) {
  if (state.missing != 0 || state.copied_bytes != state.missing_bytes) return;
  for (const emulator::Copy& copy : state.copies) copy();
  state.copies.clear();
  state.copied_bytes = state.missing_bytes = 0;
  state.missing = state.size;
  ++state.phase;
}

inline void arrive_and_expect(Barrier* barrier, int bytes) {
  BarrierState& state = barriers.at(barrier);
  ++emulator::arrivals;
  --state.missing;
  state.missing_bytes += bytes;
}
inline void arrive(Barrier* barrier) {
  arrive_and_expect(barrier, 0);
  look_at(barriers.at(barrier));
  emulator::yield();  // whoever waited for this may now go on before this thread does
}

inline void wait_for_phase(Barrier* barrier, unsigned parity) {
  while (true) {
    // A phase shows by its parity alone: whoever waits for the next but one may go on too early.
    BarrierState& state = barriers.at(barrier);
    if (state.phase % 2 != parity) return;
    look_at(state);
    if (state.phase % 2 != parity) return;
    emulator::yield();
  }
}

inline void copy_for(BarrierState& state, void* to, const void* from, int bytes, int size) {
  const emulator::Copy copy{to, from, bytes, size - bytes};
  state.copied_bytes += size;
  if (emulator::settings.copies_land_early) {
    copy();
  } else {
    state.copies.push_back(copy);
  }
}

// The byte of shared memory in which byte `offset` of it lies when its tile's pieces are exchanged.
inline unsigned char* exchanged(std::ptrdiff_t offset) {
  return dynamic_shared_memory() + (offset ^ (offset >> 7 & 7) << 4);
}

inline std::ptrdiff_t offset_of(const void* p) {
  return static_cast<const unsigned char*>(p) - dynamic_shared_memory();
}

inline void copy_tile(void* to, const TileMap& map, int row, int column, Barrier* barrier) {
  BarrierState& state = barriers.at(barrier);
  const std::ptrdiff_t offset = offset_of(to);
  if (offset % kTileAlignment) std::abort();
  for (int i = 0; i < map.tile_rows; ++i) {
    for (int piece = 0; piece < kTileRowBytes / kPiece; ++piece) {
      const std::int64_t r = row + i, c = column + piece * 8;
      const bool exists = r < map.rows && c < map.columns;
      copy_for(state, exchanged(offset + i * kTileRowBytes + piece * kPiece),
               exists ? map.data + 2 * (r * map.row_stride + c) : nullptr, exists ? kPiece : 0,
               kPiece);
    }
  }
}

inline void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
  copy_for(barriers.at(barrier), to, from, bytes, bytes);
}

inline void begin_products() {}
inline void commit_products() { emulator::current->products.commit(); }
template <int kPending>
void wait_for_products() {
  emulator::current->products.wait(kPending);
  emulator::wait_at(emulator::current->warp->barrier);  // a warp's threads are waited for together
}

inline void keep(std::uint32_t) {}

template <typename T>
float element_at(std::ptrdiff_t offset) {
  std::uint16_t bits;
  std::memcpy(&bits, exchanged(offset), sizeof bits);
  return element<T>(bits, 0);
}

// Sums and metadata of a warp are those of mma.sp.m16n8k32, for its 16 of the 64 rows.
template <typename T, int kTokens, int kSelector>
void multiply_add_2to4(float (&sum)[kTokens / 2], const void* w, const void* x,
                       std::uint32_t metadata) {
  const std::uint64_t mine[1] = {metadata};
  std::uint64_t all[32][1];
  exchange(mine, all);
  const int lane = static_cast<int>(emulator::current->thread % 32);
  const int warp = static_cast<int>(emulator::current->thread / 32 % 4);
  std::uint16_t codes[2];
  std::uint32_t of_row[2] = {};
  for (int half = 0; half < 2; ++half) {
    for (int quarter = 0; quarter < 2; ++quarter) {
      const auto word = all[lane / 4 * 4 + 2 * kSelector + quarter][0];
      codes[quarter] = static_cast<std::uint16_t>(word >> (16 * half));
    }
    of_row[half] = codes[0] | static_cast<std::uint32_t>(codes[1]) << 16;
  }
  const std::ptrdiff_t w_at = offset_of(w), x_at = offset_of(x);
  const auto multiply = [=, low = of_row[0], high = of_row[1], sums = &sum[0]] {
    for (int i = 0; i < kTokens / 2; ++i) {
      const int row = warp * 16 + lane / 4 + i % 4 / 2 * 8;
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
      for (int group = 0; group < 8; ++group) {
        const int code = (i % 4 / 2 ? high : low) >> (4 * group) & 15;
        const int kept[2] = {code & 3, code >> 2};
        if (kept[0] >= kept[1]) sums[i] = NAN;  // undefined on the GPU
        for (int j = 0; j < 2; ++j) {
          sums[i] += element_at<T>(w_at + row * kTileRowBytes + 2 * (2 * group + j)) *
                     element_at<T>(x_at + token * kTileRowBytes + 2 * (4 * group + kept[j]));
        }
      }
    }
  };
  if (!emulator::settings.copies_land_early && !emulator::settings.descending) {
    multiply();
  } else {
    emulator::current->products.open.push_back(multiply);
  }
}

}  // namespace proxsparse
