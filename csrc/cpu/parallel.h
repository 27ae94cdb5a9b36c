// Rows over torch's own threads: a second pool would fight it for the cores. Not for kernel files.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace starflow::cpu {

// Elements below which waking another thread costs more than it saves (some 40 us against 1 ns an element).
inline constexpr int64_t grain_elements = 16384;

// The same for ops of a few instructions an element (a fifth of a nanosecond from the caches).
inline constexpr int64_t light_grain_elements = 4 * grain_elements;

// Each row is computed whole by one thread, so that results do not depend on how many there are.
template <class Function>
void parallel_rows(int64_t rows, int64_t elements_per_row, const Function& function,
                   int64_t grain_of_op = grain_elements) {
    if (rows == 0) return;
    const int64_t grain = std::max<int64_t>(1, grain_of_op / std::max<int64_t>(1, elements_per_row));
    torch::stable::parallel_for(0, rows, grain, function);
}

}  // namespace starflow::cpu
