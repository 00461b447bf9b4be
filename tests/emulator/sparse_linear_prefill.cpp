// sparse_linear_prefill for ctypes, compiled beside copies of its sources in csrc/cuda.
#include "sparse_linear_prefill.h"

#include "emulator.h"

extern "C" __attribute__((visibility("default"))) const char* prefill(
    const void* x, const void* values, const void* codes, const void* bias, void* y, int tokens,
    int in_features, int out_features, std::int64_t x_stride, bool is_bfloat16, int rows,
    int tile_tokens, int cluster, void* workspace, std::size_t workspace_bytes, int* signals,
    bool copies_land_early, bool descending, int device, int multiprocessors, int major,
    std::size_t* needed_bytes) {
  // The library asks a device for its properties once: others must be another device's.
  emulator::settings = {copies_land_early, descending, device, 227 * 1024, multiprocessors, major};
  return proxsparse::sparse_linear_prefill({x,
                                            values,
                                            codes,
                                            bias,
                                            y,
                                            tokens,
                                            in_features,
                                            out_features,
                                            x_stride,
                                            is_bfloat16,
                                            {rows, tile_tokens, cluster},
                                            true,
                                            workspace,
                                            workspace_bytes,
                                            signals,
                                            nullptr},
                                           *needed_bytes);
}

extern "C" __attribute__((visibility("default"))) const char* prefill_fp8(
    const void* x, const void* values, const void* codes, const void* bias, void* y,
    const float* token_scales, const float* row_scales, int tokens, int in_features,
    int out_features, bool is_bfloat16, int rows, int tile_tokens, int cluster, void* workspace,
    std::size_t workspace_bytes, int* signals, bool copies_land_early, bool descending, int device,
    int multiprocessors, int major, std::size_t* needed_bytes) {
  emulator::settings = {copies_land_early, descending, device, 227 * 1024, multiprocessors, major};
  return proxsparse::sparse_linear_prefill({x,
                                            values,
                                            codes,
                                            bias,
                                            y,
                                            tokens,
                                            in_features,
                                            out_features,
                                            in_features,
                                            is_bfloat16,
                                            {rows, tile_tokens, cluster},
                                            true,
                                            workspace,
                                            workspace_bytes,
                                            signals,
                                            nullptr,
                                            true,
                                            token_scales,
                                            row_scales},
                                           *needed_bytes);
}
