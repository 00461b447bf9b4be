#include "kernels.h"
#include "solver.h"

namespace proxsparse {

PROXSPARSE_CLONES static void prox_range(const Operand& z, const Operand& out, float lam,
                                         std::int64_t begin, std::int64_t end) {
  const Prox prox(lam);
  alignas(64) float buffer[kTile], tile[kTile];
  for (std::int64_t at = begin; at < end; at += kTile) {
    const int n = static_cast<int>(end - at < kTile ? end - at : kTile);
    std::memcpy(tile, z.read(at, n, buffer), sizeof tile);
    prox.apply(tile);
    out.write(at, n, tile);
  }
}

void prox_2to4(Operand z, Operand out, std::int64_t size, float lam, int threads) {
  parallel_ranges(size, kTile, 1 << 13, threads, [&](std::int64_t begin, std::int64_t end) {
    prox_range(z, out, lam, begin, end);
  });
}

}  // namespace proxsparse
