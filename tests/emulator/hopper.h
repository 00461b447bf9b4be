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
  int tile_rows, row_bytes;
};

inline const char* describe_tiles(TileMap* map, const void* data, std::int64_t rows,
                                  std::int64_t columns, std::int64_t row_stride, int tile_rows,
                                  bool, int row_bytes = kTileRowBytes) {
  *map = {static_cast<const unsigned char*>(data), rows, columns, row_stride, tile_rows, row_bytes};
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

// The same place in the memory of block `rank` of the cluster, which must not have ended.
inline unsigned char* at_block(int rank, const void* mine) {
  emulator::Block& block = emulator::cluster->blocks[rank];
  if (block.running == 0) std::abort();
  return block.memory.data() + (static_cast<const unsigned char*>(mine) - dynamic_shared_memory());
}

inline void arrive_at(int rank, Barrier* barrier, int count = 1) {
  for (int i = 0; i < count; ++i) arrive(reinterpret_cast<Barrier*>(at_block(rank, barrier)));
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

// Where byte `offset` of shared memory lies when the pieces of its tile are exchanged.
inline std::ptrdiff_t exchanged(std::ptrdiff_t offset, int row_bytes) {
  return offset ^ (offset >> 7 & (row_bytes / kPiece - 1)) << 4;
}

inline std::ptrdiff_t offset_of(const void* p) {
  return static_cast<const unsigned char*>(p) - dynamic_shared_memory();
}

// Calls visit(piece of shared memory, piece of the matrix or null) for all of a tile.
template <class Visit>
void visit_tile(const void* tile, const TileMap& map, int row, int column, Visit&& visit) {
  const std::ptrdiff_t offset = offset_of(tile);
  if (offset % kTileAlignment) std::abort();
  for (int i = 0; i < map.tile_rows; ++i) {
    for (int piece = 0; piece < map.row_bytes / kPiece; ++piece) {
      const std::int64_t r = row + i, c = column + piece * 8;
      const bool exists = r < map.rows && c < map.columns;
      const std::ptrdiff_t at = offset + i * map.row_bytes + piece * kPiece;
      visit(dynamic_shared_memory() + exchanged(at, map.row_bytes),
            exists ? map.data + 2 * (r * map.row_stride + c) : nullptr);
    }
  }
}

inline void copy_tile_to_cluster(void* to, const TileMap& map, int row, int column,
                                 Barrier* barrier, std::uint16_t blocks) {
  for (int rank = 0; blocks >> rank; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    BarrierState& state = barriers.at(reinterpret_cast<Barrier*>(at_block(rank, barrier)));
    visit_tile(to, map, row, column, [&](unsigned char* piece, const unsigned char* from) {
      copy_for(state, at_block(rank, piece), from, from == nullptr ? 0 : kPiece, kPiece);
    });
  }
}

inline void copy_tile(void* to, const TileMap& map, int row, int column, Barrier* barrier) {
  BarrierState& state = barriers.at(barrier);
  visit_tile(to, map, row, column, [&](unsigned char* piece, const unsigned char* from) {
    copy_for(state, piece, from, from == nullptr ? 0 : kPiece, kPiece);
  });
}

inline void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
  copy_for(barriers.at(barrier), to, from, bytes, bytes);
}

inline void store_tile(const TileMap& map, int row, int column, const void* from) {
  const auto store = [=] {
    visit_tile(from, map, row, column, [](const unsigned char* piece, const unsigned char* to) {
      if (to != nullptr) std::memcpy(const_cast<unsigned char*>(to), piece, kPiece);
    });
  };
  if (emulator::settings.copies_land_early) {
    store();
  } else {
    emulator::current->stores.open.push_back(store);
  }
}

inline void commit_stores() { emulator::current->stores.commit(); }
template <int kPending>
void wait_for_stores() {
  emulator::current->stores.wait(kPending);
}
inline void show_to_stores() {
  for (const auto& write : emulator::current->writes) write();
  emulator::current->writes.clear();
}

inline void store_transposed(void* piece, const std::uint32_t (&fragment)[4]) {
  const std::uint64_t mine[5] = {reinterpret_cast<std::uintptr_t>(piece), fragment[0], fragment[1],
                                 fragment[2], fragment[3]};
  std::uint64_t all[32][5];
  exchange(mine, all);
  const unsigned lane = emulator::current->thread % 32;
  for (unsigned row = 0; row < 8; ++row) {  // a thread writes what it points to
    const std::uint64_t word = all[row * 4 + lane % 8 / 2][1 + lane / 8];
    const auto element = static_cast<std::uint16_t>(word >> (16 * (lane % 2)));
    emulator::current->writes.push_back([=, to = static_cast<unsigned char*>(piece) + 2 * row] {
      std::memcpy(to, &element, sizeof element);
    });
  }
}

template <typename T>
std::uint32_t round_pair(float first, float second) {
  T pair[2];
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    pair[0] = __float2bfloat16_rn(first), pair[1] = __float2bfloat16_rn(second);
  } else {
    pair[0] = __float2half_rn(first), pair[1] = __float2half_rn(second);
  }
  std::uint32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return bits;
}

template <int>
void give_registers() {}
template <int>
void take_registers() {}

inline void begin_products() {}
inline void commit_products() { emulator::current->products.commit(); }
template <int kPending>
void wait_for_products() {
  emulator::current->products.wait(kPending);
  emulator::wait_at(emulator::current->warp->barrier);  // a warp's threads are waited for together
}

inline bool is_elected() { return emulator::current->thread % 32 == 0; }

inline void keep(std::uint32_t) {}

using Operand = const unsigned char*;

template <typename T, int kRowBytes>
float element_at(std::ptrdiff_t offset) {
  std::uint16_t bits;
  std::memcpy(&bits, dynamic_shared_memory() + exchanged(offset, kRowBytes), sizeof bits);
  return element<T>(bits, 0);
}

struct Fp8 {};

inline float fp8_at(std::ptrdiff_t offset, int row_bytes) {
  const unsigned char bits = dynamic_shared_memory()[exchanged(offset, row_bytes)];
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  if ((bits & 127) == 127) return NAN;
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(fraction), -9)
                              : std::ldexp(static_cast<float>(8 + fraction), exponent - 10);
  return bits & 128 ? -magnitude : magnitude;
}

// With numbers of 8 bits every thread of a quad gives eight codes of one row: thread q of it those
// of row r + 8 * (q % 2), of columns 32 * (q / 2) to 32 * (q / 2) + 31.
template <int kTokens, int kRowBytes>
void multiply_add_fp8(float (&sum)[kTokens / 2], const void* w, const void* x,
                      std::uint32_t metadata, int adds) {
  const std::uint64_t mine[1] = {metadata};
  std::uint64_t all[32][1];
  exchange(mine, all);
  const int lane = static_cast<int>(emulator::current->thread % 32);
  const int warp = static_cast<int>(emulator::current->thread / 32 % 4);
  std::uint32_t words[2][2];
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 2; ++i) {
      words[half][i] = static_cast<std::uint32_t>(all[lane / 4 * 4 + half + 2 * i][0]);
    }
  }
  const std::ptrdiff_t w_at = offset_of(w), x_at = offset_of(x);
  const auto multiply = [=, sums = &sum[0]] {
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + lane / 4 + half * 8;
      float kept[32];
      int columns[32];
      for (int j = 0; j < 32; ++j) {
        const int group = j / 2, code = words[half][group / 8] >> (4 * (group % 8)) & 15;
        const bool is_valid = (code & 3) < code >> 2;  // undefined on the GPU if not
        kept[j] = is_valid ? fp8_at(w_at + row * kRowBytes + j, kRowBytes) : NAN;
        columns[j] = group * 4 + (j % 2 ? code >> 2 : code & 3);
      }
      for (int i = 0; i < kTokens / 2; ++i) {
        if (i % 4 / 2 != half) continue;
        const std::ptrdiff_t token = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (adds == 0) sums[i] = 0;
        for (int j = 0; j < 32; ++j) {
          sums[i] += kept[j] * fp8_at(x_at + token * kTileRowBytes + columns[j], kTileRowBytes);
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

// Sums and metadata of a warp are those of mma.sp.m16n8k32, for its 16 of the 64 rows.
template <typename T, int kTokens, int kSelector, int kRowBytes>
void multiply_add_16_bit(float (&sum)[kTokens / 2], const void* w, const void* x,
                         std::uint32_t metadata, int adds) {
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
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + lane / 4 + half * 8;
      float kept[16];
      int columns[16];
      for (int j = 0; j < 16; ++j) {
        const int code = (half ? high : low) >> (4 * (j / 2)) & 15;
        const bool is_valid = (code & 3) < code >> 2;  // undefined on the GPU if not
        kept[j] = is_valid ? element_at<T, kRowBytes>(w_at + row * kRowBytes + 2 * j) : NAN;
        columns[j] = j / 2 * 4 + (j % 2 ? code >> 2 : code & 3);
      }
      for (int i = 0; i < kTokens / 2; ++i) {
        if (i % 4 / 2 != half) continue;
        const std::ptrdiff_t token = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (adds == 0) sums[i] = 0;
        for (int j = 0; j < 16; ++j) {
          const std::ptrdiff_t at = x_at + token * kTileRowBytes + 2 * columns[j];
          sums[i] += kept[j] * element_at<T, kTileRowBytes>(at);
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

template <typename T, int kTokens, int kSelector, int kRowBytes = kTileRowBytes>
void multiply_add_2to4(float (&sum)[kTokens / 2], const void* w, const void* x,
                       std::uint32_t metadata, int adds = 1) {
  if constexpr (std::is_same_v<T, Fp8>) {
    multiply_add_fp8<kTokens, kRowBytes>(sum, w, x, metadata, adds);
  } else {
    multiply_add_16_bit<T, kTokens, kSelector, kRowBytes>(sum, w, x, metadata, adds);
  }
}

}  // namespace proxsparse
