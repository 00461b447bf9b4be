// sparse_linear_decode for ctypes, compiled beside copies of its sources in csrc/cuda.
#include "sparse_linear_decode.h"

#include "emulator.h"

extern "C" __attribute__((visibility("default"))) const char* decode_fp8(
    const void* x, const float* token_scales, const proxsparse::DecodeWeight* weights,
    int num_weights, int tokens, int in_features, bool is_bfloat16, int rows, int depth, int splits,
    bool copies_land_early, bool descending, int device, int shared_bytes, int major) {
  emulator::settings = {copies_land_early, descending, device, shared_bytes, 132, major};
  return proxsparse::sparse_linear_decode({x,
                                           weights,
                                           num_weights,
                                           tokens,
                                           in_features,
                                           in_features,
                                           is_bfloat16,
                                           {rows, depth, splits},
                                           true,
                                           nullptr,
                                           true,
                                           token_scales});
}

extern "C" __attribute__((visibility("default"))) const char* decode(
    const void* x, const proxsparse::DecodeWeight* weights, int num_weights, int tokens,
    int in_features, std::int64_t x_stride, bool is_bfloat16, int rows, int depth, int splits,
    bool copies_land_early, bool descending, int device, int shared_bytes, int major) {
  // The library asks a device for its properties once: another size must be another device.
  emulator::settings = {copies_land_early, descending, device, shared_bytes, 132, major};
  return proxsparse::sparse_linear_decode({x,
                                           weights,
                                           num_weights,
                                           tokens,
                                           in_features,
                                           x_stride,
                                           is_bfloat16,
                                           {rows, depth, splits},
                                           true,
                                           nullptr});
}
