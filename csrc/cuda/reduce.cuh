// Reductions over a warp, a block and blocks, in a fixed order: the same bits every time.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/enqueue.cuh"

namespace starflow::cuda {

inline constexpr int warp_size = 32;
inline constexpr unsigned whole_warp = 0xffffffffU;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % warp_size; }

template <class T>
__device__ T warp_sum(T value) {
#pragma unroll
    for (int offset = warp_size / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(whole_warp, value, offset);
    return value;
}

// The sum over each group of `lanes` neighbours, a power of two. Every lane of the warp takes part.
template <class T>
__device__ T group_sum(T value, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(whole_warp, value, offset);
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

// Sums over the threads of a block; every thread gets them. Rows of `scratch` serve in turn: what one call still reads,
// the next one does not write.
template <class T, int most>
class BlockSums {
  public:
    using Scratch = T[2][most][warp_size];

    __device__ explicit BlockSums(Scratch& scratch) : scratch_(scratch) {}

    template <int count>
    __device__ void operator()(T (&values)[count]) {
        static_assert(count <= most);
        const int warps = static_cast<int>(blockDim.x) / warp_size;
#pragma unroll
        for (int i = 0; i < count; ++i) values[i] = warp_sum(values[i]);
        if (warps == 1) return;
        if (lane() == 0) {
#pragma unroll
            for (int i = 0; i < count; ++i) scratch_[turn_][i][threadIdx.x / warp_size] = values[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < count; ++i) {
            values[i] = T(0);
            for (int warp = 0; warp < warps; ++warp) values[i] += scratch_[turn_][i][warp];
        }
        turn_ = 1 - turn_;
    }

  private:
    Scratch& scratch_;
    int turn_ = 0;
};

// out[c] = sum over rows of in[row, c]: in (rows, channels), contiguous.
template <class T>
static __global__ void sum_rows_kernel(const T* in, T* out, int64_t rows, int64_t channels) {
    constexpr int warps = 8;
    __shared__ T sums[warps][warp_size];
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    const int64_t c = static_cast<int64_t>(blockIdx.x) * warp_size + lane();
    T sum = 0;
    if (c < channels) {
        for (int64_t row = warp; row < rows; row += warps) sum += in[row * channels + c];
    }
    sums[warp][lane()] = sum;
    __syncthreads();
    if (warp > 0 || c >= channels) return;
    sum = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) sum += sums[w][lane()];
    out[c] = sum;
}

template <class T>
int sum_rows(const void* in, void* out, int64_t rows, int64_t channels, void* stream) {
    if (channels == 0) return 0;
    const auto blocks = static_cast<unsigned>((channels + warp_size - 1) / warp_size);
    return enqueue(sum_rows_kernel<T>, blocks, 8 * warp_size, 0, stream, static_cast<const T*>(in),
                   static_cast<T*>(out), rows, channels);
}

}  // namespace starflow::cuda
