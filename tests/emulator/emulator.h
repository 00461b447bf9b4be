// Runs CUDA kernels on the CPU, one block cluster at a time, to test their logic without a GPU.
//
// Each CUDA thread is a fiber. It runs until it meets a barrier (of its warp, block or cluster, or
// one in shared memory), so a kernel that lacks one goes wrong here as it may there. Two switches
// make the usual races show: asynchronous copies land either at once or as late as they may, and
// warps take turns in ascending order, or each block, and of it each warp, runs as far as it gets,
// the last one first. Timing, bank conflicts and memory models are not emulated.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace emulator {

struct Settings {
  bool copies_land_early = false, descending = false;
  int device = 0, shared_bytes = 227 * 1024, multiprocessors = 132, major = 9;
};
inline Settings settings;

struct Dim {
  unsigned x = 1, y = 1, z = 1;
  Dim(unsigned x = 1) : x(x) {}
};

// Counts arrivals; a fiber waits until the count of its round is full.
struct Barrier {
  int size = 0, arrived = 0;
  std::uint64_t round = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes, zeros;
  void operator()() const {
    if (bytes) std::memcpy(to, from, bytes);
    std::memset(static_cast<char*>(to) + bytes, 0, zeros);
  }
};

// What a thread has asked for and nobody has done yet, in groups that it waits for.
template <class Operation>
struct Groups {
  std::vector<Operation> open;
  std::vector<std::vector<Operation>> committed;

  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
  void wait(std::size_t pending) {
    while (committed.size() > pending) {
      for (const Operation& operation : committed.front()) operation();
      committed.erase(committed.begin());
    }
  }
};

struct Block {
  std::vector<unsigned char> memory;
  Barrier barrier;
  unsigned index = 0;
  int running = 0;  // threads; the memory is gone when none is left
};

struct Warp {
  Barrier barrier;
  std::uint64_t exchange[32][16];  // what the threads of a collective instruction give
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned thread = 0;
  bool done = false;
  Groups<Copy> copies;
  Groups<std::function<void()>> products;     // of a warpgroup
  Groups<std::function<void()>> stores;       // of tiles, to device memory
  std::vector<std::function<void()>> writes;  // to shared memory, that stores do not see yet
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
};

inline Fiber* current;
inline Cluster* cluster;
inline ucontext_t scheduler;
inline std::uint64_t arrivals;  // at barriers in shared memory

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void wait_at(Barrier& barrier) {
  const std::uint64_t round = barrier.round;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.round;
    return;
  }
  while (barrier.round == round) yield();
}

inline std::function<void()> body;

inline void start() {
  body();
  current->done = true;
  Block& block = *current->block;
  if (--block.running == 0) std::fill(block.memory.begin(), block.memory.end(), 0xff);
  yield();
}

// Runs all blocks of a grid; false if the threads of a cluster wait for each other for ever.
inline bool run_grid(unsigned num_blocks, unsigned num_threads, unsigned cluster_size,
                     std::size_t shared_bytes, std::function<void()> kernel) {
  constexpr std::size_t kStack = 64 * 1024;
  body = std::move(kernel);
  for (unsigned first = 0; first < num_blocks; first += cluster_size) {
    Cluster blocks;
    cluster = &blocks;
    blocks.blocks.resize(cluster_size);
    blocks.barrier.size = static_cast<int>(cluster_size * num_threads);
    std::vector<Warp> warps(cluster_size * (num_threads / 32));
    std::vector<Fiber> fibers(cluster_size * num_threads);
    for (unsigned b = 0; b < cluster_size; ++b) {
      Block& block = blocks.blocks[b];
      block.index = first + b;
      block.memory.assign(shared_bytes, 0xff);  // NaN as bfloat16, float16 and float32
      block.barrier.size = block.running = static_cast<int>(num_threads);
      for (unsigned t = 0; t < num_threads; ++t) {
        Fiber& fiber = fibers[b * num_threads + t];
        fiber.block = &block;
        fiber.warp = &warps[(b * num_threads + t) / 32];
        fiber.warp->barrier.size = 32;
        fiber.thread = t;
        fiber.stack.reset(new char[kStack]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        makecontext(&fiber.context, start, 0);
      }
    }
    const auto progress = [&] {
      std::uint64_t total = blocks.barrier.round + blocks.barrier.arrived + arrivals * 65536;
      for (const Block& block : blocks.blocks)
        total += block.barrier.round * 4096 + block.barrier.arrived;
      for (const Warp& warp : warps) total += warp.barrier.round * 64 + warp.barrier.arrived;
      for (const Fiber& fiber : fibers) total += fiber.done;
      return total;
    };
    // Warp w until it waits, or as far as it gets; whether it is done.
    const auto run_warp = [&](std::size_t w) {
      bool is_done;
      std::uint64_t reached;
      do {
        reached = progress();
        is_done = true;
        for (std::size_t i = 0; i < 32; ++i) {
          Fiber& fiber = fibers[32 * w + (settings.descending ? 31 - i : i)];
          if (fiber.done) continue;
          current = &fiber;
          swapcontext(&scheduler, &fiber.context);
          is_done = is_done && fiber.done;
        }
      } while (settings.descending && reached != progress());
      return is_done;
    };
    const std::size_t warps_of_block = num_threads / 32;
    for (;;) {
      const std::uint64_t before = progress();
      bool all_done = true;
      for (std::size_t b = 0; b < cluster_size; ++b) {
        const std::size_t block = settings.descending ? cluster_size - 1 - b : b;
        bool is_done;
        std::uint64_t reached;
        do {
          reached = progress();
          is_done = true;
          for (std::size_t i = 0; i < warps_of_block; ++i) {
            const std::size_t w = settings.descending ? warps_of_block - 1 - i : i;
            is_done = run_warp(block * warps_of_block + w) && is_done;
          }
        } while (settings.descending && reached != progress());
        all_done = all_done && is_done;
      }
      if (all_done) break;
      if (progress() == before) return false;
    }
  }
  return true;
}

inline void copy_later(void* to, const void* from, int bytes, int size) {
  const Copy copy{to, from, bytes, size - bytes};
  if (settings.copies_land_early) {
    copy();
  } else {
    current->copies.open.push_back(copy);
  }
}

}  // namespace emulator
