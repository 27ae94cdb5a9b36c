// Rows over torch's own threads: a second pool would fight it for the cores. Not for kernel files.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

namespace starflow::cpu {

// Elements below which waking another thread costs more than it saves (some 40 us against 1 ns an element).
inline constexpr int64_t grain_elements = 16384;

// The same for ops of a few instructions an element (a fifth of a nanosecond from the caches).
inline constexpr int64_t light_grain_elements = 4 * grain_elements;

// torch::stable::parallel_for, whose C interface loses an exception's message: the first one is thrown again here.
template <class Function>
void parallel(int64_t items, int64_t grain, const Function& function) {
    std::string sentence;
    std::atomic<bool> thrown = false;
    torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
        try {
            function(begin, end);
        } catch (const std::exception& error) {
            if (!thrown.exchange(true)) sentence = error.what();
        }
    });
    if (thrown) throw std::runtime_error(sentence);
}

// Each row is computed whole by one thread, so that results do not depend on how many there are.
template <class Function>
void parallel_rows(int64_t rows, int64_t elements_per_row, const Function& function,
                   int64_t grain_of_op = grain_elements) {
    if (rows == 0) return;
    const int64_t grain = std::max<int64_t>(1, grain_of_op / std::max<int64_t>(1, elements_per_row));
    parallel(rows, grain, function);
}

}  // namespace starflow::cpu
