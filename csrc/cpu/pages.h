// Large results on large pages. Not for kernel files.
#pragma once
#include <vector>

#include "common/tensor.h"

namespace starflow::cpu {

// Results from this size on come from fresh pages of the system, and do not stay in the caches.
inline constexpr int64_t large_bytes = int64_t{8} * 1024 * 1024;

// Ask for 2 MB pages under a new tensor of at least `least` bytes: the first touch of each 4 KB page costs more than
// computing what it holds (filling 64 MB: 87 ms, and 19 ms with large pages). Advice only: a system that has none
// ignores it.
void prefer_large_pages(const Tensor& result, int64_t least = large_bytes);

}  // namespace starflow::cpu

namespace starflow {

// A new tensor for a result, on large pages where it is large; with the shape and dtype of another one, or its own.
Tensor new_result(const Tensor& like);
Tensor new_result(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type);

// Whether a result is better written past the caches: it would not stay in them, and each line would be read before it
// is written. Its rows must be whole cache lines, so that no line is written in two parts.
bool worth_streaming(const Tensor& result);

}  // namespace starflow
