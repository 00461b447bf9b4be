// Which CUDA graph a stream is being captured for.
#pragma once

#include <cstdint>

namespace proxsparse {

// A number of its own for each capture, or 0 when the stream is not being captured.
std::uint64_t capture_of(void* stream);

}  // namespace proxsparse
