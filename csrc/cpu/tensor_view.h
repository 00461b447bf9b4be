// Shared by every CPU kernel: dtype conversion, tiles and threads.
//
// Kernels take raw pointers and do their arithmetic in float32. A tile is `kTile` consecutive
// elements; a tensor's last tile is padded with zeros, so one code path serves every size. Tiles
// lie at multiples of kTile whatever the number of threads, so results do not depend on it.
#pragma once

#include <cstdint>
#include <cstring>

// One portable build that is fast on each machine: the loops of a function marked PROXSPARSE_CLONES
// are compiled once per instruction set and glibc's loader picks. Elsewhere the baseline is used.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GLIBC__) && defined(__GNUC__) && \
    !defined(__clang__) && __GNUC__ >= 12
#define PROXSPARSE_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PROXSPARSE_CLONES
#endif
// A helper of a cloned function must be inlined, or it would be compiled for the baseline only.
#define PROXSPARSE_INLINE inline __attribute__((always_inline))
#define PROXSPARSE_SIMD _Pragma("omp simd")

namespace proxsparse {

constexpr int kLanes = 128;        // groups solved side by side
constexpr int kTile = 4 * kLanes;  // elements per tile

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

PROXSPARSE_INLINE float bits_to_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

PROXSPARSE_INLINE std::uint32_t float_to_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

PROXSPARSE_INLINE float bfloat16_to_float(std::uint16_t h) {
  return bits_to_float(static_cast<std::uint32_t>(h) << 16);
}

// Round to nearest even; NaN stays a quiet NaN.
PROXSPARSE_INLINE std::uint16_t float_to_bfloat16(float x) {
  const std::uint32_t bits = float_to_bits(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>(x != x ? 0x7fc0u : rounded);
}

// The exponent is rebased by a multiplication, which also normalises subnormals.
PROXSPARSE_INLINE float float16_to_float(std::uint16_t h) {
  const std::uint32_t magnitude = h & 0x7fffu;
  const float scaled = bits_to_float(magnitude << 13) * 0x1p112f;
  const std::uint32_t special = (magnitude << 13) | 0x7f800000u;  // inf and NaN
  const std::uint32_t bits = magnitude >= 0x7c00u ? special : float_to_bits(scaled);
  return bits_to_float(bits | (static_cast<std::uint32_t>(h & 0x8000u) << 16));
}

// Round to nearest even. Subnormal results are rounded by the adder: at 0.5f the unit of the last
// place is 2^-24, the one of float16's subnormals.
PROXSPARSE_INLINE std::uint16_t float_to_float16(float x) {
  const std::uint32_t bits = float_to_bits(x);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<std::uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// One tensor of a call, contiguous. Float32 tiles are used where they lie; others pass through a
// buffer of the caller.
struct Operand {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;

  // Elements [at, at + n) as float32; the rest of the tile reads zero.
  PROXSPARSE_INLINE const float* read(std::int64_t at, int n, float* buffer) const {
    if (dtype == Dtype::kFloat32) {
      const float* source = static_cast<const float*>(data) + at;
      if (n == kTile) return source;
      std::memcpy(buffer, source, sizeof(float) * n);
    } else if (dtype == Dtype::kBFloat16) {
      const auto* source = static_cast<const std::uint16_t*>(data) + at;
      PROXSPARSE_SIMD
      for (int i = 0; i < n; ++i) buffer[i] = bfloat16_to_float(source[i]);
    } else if (dtype == Dtype::kFloat16) {
      const auto* source = static_cast<const std::uint16_t*>(data) + at;
      PROXSPARSE_SIMD
      for (int i = 0; i < n; ++i) buffer[i] = float16_to_float(source[i]);
    } else {
      const double* source = static_cast<const double*>(data) + at;
      PROXSPARSE_SIMD
      for (int i = 0; i < n; ++i) buffer[i] = static_cast<float>(source[i]);
    }
    for (int i = n; i < kTile; ++i) buffer[i] = 0.0f;
    return buffer;
  }

  // Asks for [at, at + n) ahead of its use, in the second cache: it is too early for the first.
  PROXSPARSE_INLINE void prefetch(std::int64_t at, int n) const {
    const int itemsize = dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
    const char* first = static_cast<const char*>(data) + at * itemsize;
    for (int i = 0; i < n * itemsize; i += 64) __builtin_prefetch(first + i, 0, 2);
  }

  // Where to compute a full tile in place, or else `buffer`; `write` then finishes the job.
  PROXSPARSE_INLINE float* target(std::int64_t at, int n, float* buffer) const {
    return dtype == Dtype::kFloat32 && n == kTile ? static_cast<float*>(data) + at : buffer;
  }

  // Writes the first n of a tile's values to [at, at + n), unless they lie there already.
  PROXSPARSE_INLINE void write(std::int64_t at, int n, const float* values) const {
    if (dtype == Dtype::kFloat32) {
      float* target = static_cast<float*>(data) + at;
      if (n < kTile) {
        std::memcpy(target, values, sizeof(float) * n);
      } else if (target != values) {
        std::memcpy(target, values, sizeof(float) * kTile);  // inlined, as its size is constant
      }
    } else if (dtype == Dtype::kBFloat16) {
      auto* target = static_cast<std::uint16_t*>(data) + at;
      PROXSPARSE_SIMD
      for (int i = 0; i < n; ++i) target[i] = float_to_bfloat16(values[i]);
    } else if (dtype == Dtype::kFloat16) {
      auto* target = static_cast<std::uint16_t*>(data) + at;
      PROXSPARSE_SIMD
      for (int i = 0; i < n; ++i) target[i] = float_to_float16(values[i]);
    } else {
      double* target = static_cast<double*>(data) + at;
      PROXSPARSE_SIMD
      for (int i = 0; i < n; ++i) target[i] = values[i];
    }
  }
};

// Calls body(begin, end) on contiguous shares of [0, items), whole multiples of `grain` each, one
// per thread. Fewer threads are used when a share would not pay for waking one.
template <class Body>
void parallel_ranges(std::int64_t items, std::int64_t grain, std::int64_t worthwhile, int threads,
                     const Body& body) {
  const std::int64_t most = items / worthwhile + 1;
  const int count = static_cast<int>(most < threads ? most : threads);
  const std::int64_t units = (items + grain - 1) / grain;
#pragma omp parallel for num_threads(count) schedule(static, 1) if (count > 1)
  for (int i = 0; i < count; ++i) {
    const std::int64_t begin = units * i / count * grain;
    const std::int64_t end = units * (i + 1) / count * grain;
    if (begin < items) body(begin, end < items ? end : items);
  }
}

}  // namespace proxsparse
