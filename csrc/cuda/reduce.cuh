// Reductions over a warp, in a fixed order: the same bits every time.
#pragma once

namespace starflow::cuda {

inline constexpr int warp_size = 32;
inline constexpr unsigned whole_warp = 0xffffffffU;

template <class T>
__device__ T warp_sum(T value) {
#pragma unroll
    for (int offset = warp_size / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(whole_warp, value, offset);
    return value;
}

// The larger of two values; NaN if either is.
template <class T>
__device__ T larger(T a, T b) {
    return a > b || a != a ? a : b;
}

template <class T>
__device__ T warp_largest(T value) {
#pragma unroll
    for (int offset = warp_size / 2; offset > 0; offset /= 2) {
        value = larger(value, __shfl_xor_sync(whole_warp, value, offset));
    }
    return value;
}

}  // namespace starflow::cuda
