// The functions of csrc/cuda/ptx.h on the emulator, from the fragment layouts of the PTX manual
// (ldmatrix; mma.sp.m16n8k32 with 16-bit operands and ordered metadata).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace proxsparse {

constexpr int kPiece = 16;

inline unsigned char* dynamic_shared_memory() { return emulator::current->block->memory.data(); }
inline int lane_index() { return threadIdx.x % 32; }
inline int warp_index() { return threadIdx.x / 32; }
inline void copy_weight(void* to, const void* from) { emulator::copy_later(to, from, 16, 16); }
inline void copy_tokens(void* to, const void* from, bool exists) {
  emulator::copy_later(to, from, exists ? 16 : 0, 16);
}

inline void send_signal(int* signal) { *signal = 1; }
inline void wait_for_signal(int* signal) {
  while (*signal == 0) emulator::yield();
  *signal = 0;
}
inline float4 load_signalled(const float4* from) { return *from; }

inline void commit_copies() { emulator::current->copies.commit(); }

template <int kPending>
void wait_for_copies() {
  emulator::current->copies.wait(kPending);
}

// Gives this thread's words to its warp and returns what all 32 gave.
template <int kWords>
void exchange(const std::uint64_t (&mine)[kWords], std::uint64_t (&all)[32][kWords]) {
  emulator::Warp& warp = *emulator::current->warp;
  std::memcpy(warp.exchange[emulator::current->thread % 32], mine, sizeof mine);
  emulator::wait_at(warp.barrier);
  for (int lane = 0; lane < 32; ++lane) std::memcpy(all[lane], warp.exchange[lane], sizeof mine);
  emulator::wait_at(warp.barrier);
}

// Matrix j has the rows that threads 8j to 8j + 7 point to; thread t gets elements 2(t % 4) and
// 2(t % 4) + 1 of row t / 4 of each.
inline void load_matrices(std::uint32_t (&fragment)[4], const void* piece) {
  const std::uint64_t mine[1] = {reinterpret_cast<std::uintptr_t>(piece)};
  std::uint64_t rows[32][1];
  exchange(mine, rows);
  const unsigned lane = emulator::current->thread % 32;
  for (unsigned j = 0; j < 4; ++j) {
    const auto* row = reinterpret_cast<const unsigned char*>(rows[8 * j + lane / 4][0]);
    std::memcpy(&fragment[j], row + lane % 4 * 4, 4);
  }
}

template <typename T>
float element(std::uint64_t word, int index) {
  const auto bits = static_cast<std::uint16_t>(word >> (16 * index));
  T value;
  std::memcpy(&value, &bits, sizeof value);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else {
    return __half2float(value);
  }
}

template <int kSelector, typename T>
void multiply_add_2to4(float (&sum)[4], const std::uint32_t (&w)[4], const std::uint32_t (&x)[4],
                       std::uint32_t metadata) {
  const std::uint64_t mine[9] = {w[0], w[1], w[2], w[3], x[0], x[1], x[2], x[3], metadata};
  std::uint64_t all[32][9];
  exchange(mine, all);
  const int lane = static_cast<int>(emulator::current->thread % 32);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, token = lane % 4 * 2 + i % 2;
    for (int group = 0; group < 8; ++group) {
      // The codes of 4 groups of rows r and r + 8 come from one thread of the row's quad.
      const int giver = row % 8 * 4 + 2 * kSelector + group / 4;
      const auto code = all[giver][8] >> (16 * (row / 8) + 4 * (group % 4)) & 15;
      const int kept[2] = {static_cast<int>(code & 3), static_cast<int>(code >> 2)};
      if (kept[0] >= kept[1]) sum[i] = NAN;  // undefined on the GPU
      for (int j = 0; j < 2; ++j) {
        const int column = 2 * group + j, k = 4 * group + kept[j];
        const auto& owner = all[row % 8 * 4 + column % 8 / 2];
        const float weight = element<T>(owner[row / 8 + column / 8 * 2], column % 2);
        const auto& reader = all[token * 4 + k % 8 / 2];
        sum[i] += weight * element<T>(reader[4 + k / 8], k % 2);
      }
    }
  }
}

inline void let_next_grid_start() {}
inline void wait_for_previous_grid() {}

inline void synchronize_cluster() { emulator::wait_at(emulator::cluster->barrier); }

inline float read_shared_of(int rank, const float* mine) {
  const auto offset = reinterpret_cast<const unsigned char*>(mine) - dynamic_shared_memory();
  float value;
  std::memcpy(&value, emulator::cluster->blocks[rank].memory.data() + offset, sizeof value);
  return value;
}

}  // namespace proxsparse
