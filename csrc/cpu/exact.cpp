// Projection, masks and packing: no arithmetic, so elements are handled as bit patterns of their
// size.

#include <type_traits>

#include "kernels.h"

namespace proxsparse {

namespace {

constexpr std::int64_t kWorthwhile = 1 << 15;  // elements

template <class Bits>
constexpr Bits kMagnitude = static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);

// Bits of infinity: magnitudes above it are NaN.
std::uint64_t infinity_bits(Dtype dtype) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return 0x7f80u;
    case Dtype::kFloat16:
      return 0x7c00u;
    case Dtype::kFloat32:
      return 0x7f800000u;
    default:
      return 0x7ff0000000000000u;
  }
}

// Calls body with a zero of the unsigned type as wide as `dtype`.
template <class Body>
void with_bits(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kFloat32) return body(std::uint32_t{0});
  if (dtype == Dtype::kFloat64) return body(std::uint64_t{0});
  body(std::uint16_t{0});
}

// Which entries of a group are kept: bit i for entry i. Bit patterns of magnitudes order as the
// magnitudes do; every NaN counts as the same largest value; ties keep the lower index.
template <class Bits>
PROXSPARSE_INLINE int kept(const Bits* score, Bits infinity) {
  const Bits nan = static_cast<Bits>(infinity + 1);
  Bits x[4];
  for (int i = 0; i < 4; ++i) {
    const Bits magnitude = score[i] & kMagnitude<Bits>;
    x[i] = magnitude > nan ? nan : magnitude;
  }
  const int b01 = x[0] >= x[1], b02 = x[0] >= x[2], b03 = x[0] >= x[3];
  const int b12 = x[1] >= x[2], b13 = x[1] >= x[3], b23 = x[2] >= x[3];
  return (b01 + b02 + b03 >= 2) | (1 - b01 + b12 + b13 >= 2) << 1 |
         (2 - b02 - b12 + b23 >= 2) << 2 | (3 - b03 - b13 - b23 >= 2) << 3;
}

template <class Bits>
PROXSPARSE_INLINE int num_nonzero(const Bits* group) {
  int count = 0;
  for (int i = 0; i < 4; ++i) count += (group[i] & kMagnitude<Bits>) != 0;
  return count;
}

// i | j << 2 for the kept positions i < j of each `kept` mask with two bits.
constexpr std::uint8_t kCode[16] = {0, 0, 0, 4, 0, 8, 9, 0, 0, 12, 13, 0, 14, 0, 0, 0};

}  // namespace

void project_2to4(Operand w, Operand score, Operand out, std::int64_t size, int threads) {
  with_bits(w.dtype, [&](auto zero) {
    using Bits = decltype(zero);
    with_bits(score.dtype, [&](auto score_zero) {
      using ScoreBits = decltype(score_zero);
      const auto infinity = static_cast<ScoreBits>(infinity_bits(score.dtype));
      const auto* source = static_cast<const Bits*>(w.data);
      const auto* scores = static_cast<const ScoreBits*>(score.data);
      auto* target = static_cast<Bits*>(out.data);
      parallel_ranges(size, 4, kWorthwhile, threads, [=](std::int64_t begin, std::int64_t end) {
        for (std::int64_t at = begin; at < end; at += 4) {
          const int keep = kept(scores + at, infinity);
          for (int i = 0; i < 4; ++i) {
            const auto mask = static_cast<Bits>(-static_cast<Bits>(keep >> i & 1));
            target[at + i] = source[at + i] & mask;
          }
        }
      });
    });
  });
}

void mask_2to4(Operand score, bool* out, std::int64_t size, int threads) {
  with_bits(score.dtype, [&](auto zero) {
    using Bits = decltype(zero);
    const auto infinity = static_cast<Bits>(infinity_bits(score.dtype));
    const auto* scores = static_cast<const Bits*>(score.data);
    parallel_ranges(size, 4, kWorthwhile, threads, [=](std::int64_t begin, std::int64_t end) {
      for (std::int64_t at = begin; at < end; at += 4) {
        const int keep = kept(scores + at, infinity);
        for (int i = 0; i < 4; ++i) out[at + i] = (keep >> i & 1) != 0;
      }
    });
  });
}

bool is_2to4(Operand w, std::int64_t size, int threads) {
  int violations = 0;
  with_bits(w.dtype, [&](auto zero) {
    using Bits = decltype(zero);
    const auto* source = static_cast<const Bits*>(w.data);
    parallel_ranges(size, 4, kWorthwhile, threads, [&](std::int64_t begin, std::int64_t end) {
      int found = 0;
      for (std::int64_t at = begin; at < end; at += 4) found |= num_nonzero(source + at) > 2;
#pragma omp atomic
      violations |= found;
    });
  });
  return violations == 0;
}

void pack_2to4(Operand w, void* values, std::uint8_t* codes, std::int64_t rows,
               std::int64_t in_features, int threads) {
  const std::int64_t groups = in_features / 4, bytes = (groups + 1) / 2;
  with_bits(w.dtype, [&](auto zero) {
    using Bits = decltype(zero);
    const auto infinity = static_cast<Bits>(infinity_bits(w.dtype));
    const auto* source = static_cast<const Bits*>(w.data);
    auto* target = static_cast<Bits*>(values);
    parallel_ranges(rows * bytes, 1, kWorthwhile / 8, threads,
                    [=](std::int64_t begin, std::int64_t end) {
                      for (std::int64_t byte = begin; byte < end; ++byte) {
                        const std::int64_t row = byte / bytes, first = byte % bytes * 2;
                        unsigned code = 0;
                        for (std::int64_t g = first; g < first + 2 && g < groups; ++g) {
                          const std::int64_t group = row * groups + g;
                          const unsigned nibble = kCode[kept(source + 4 * group, infinity)];
                          target[2 * group] = source[4 * group + (nibble & 3u)];
                          target[2 * group + 1] = source[4 * group + (nibble >> 2)];
                          code |= nibble << (g == first ? 0 : 4);
                        }
                        codes[byte] = static_cast<std::uint8_t>(code);
                      }
                    });
  });
}

void unpack_2to4(Operand values, const std::uint8_t* codes, void* out, std::int64_t rows,
                 std::int64_t in_features, int threads) {
  const std::int64_t groups = in_features / 4, bytes = (groups + 1) / 2;
  with_bits(values.dtype, [&](auto zero) {
    using Bits = decltype(zero);
    const auto* source = static_cast<const Bits*>(values.data);
    auto* target = static_cast<Bits*>(out);
    parallel_ranges(rows * bytes, 1, kWorthwhile / 8, threads,
                    [=](std::int64_t begin, std::int64_t end) {
                      for (std::int64_t byte = begin; byte < end; ++byte) {
                        const std::int64_t row = byte / bytes, first = byte % bytes * 2;
                        for (std::int64_t g = first; g < first + 2 && g < groups; ++g) {
                          const std::int64_t group = row * groups + g;
                          const unsigned nibble = codes[byte] >> (g == first ? 0 : 4) & 15u;
                          Bits dense[4] = {0, 0, 0, 0};
                          dense[nibble & 3u] = source[2 * group];
                          dense[nibble >> 2] = source[2 * group + 1];
                          std::memcpy(target + 4 * group, dense, sizeof dense);
                        }
                      }
                    });
  });
}

}  // namespace proxsparse
