// Large results on large pages. Not for kernel files.
#pragma once
#include "common/tensor.h"

namespace starflow::cpu {

// Results from this size on come from fresh pages of the system, and do not stay in the caches.
inline constexpr int64_t large_bytes = int64_t{8} * 1024 * 1024;

// Ask for 2 MB pages under a new large tensor: the first touch of each 4 KB page costs more than computing what it
// holds (filling 64 MB: 87 ms, and 19 ms with large pages). Advice only: a system that has none ignores it.
void prefer_large_pages(const Tensor& result);

}  // namespace starflow::cpu
