// The map from raw to shift and scale and its derivative, on the device: the CUDA kernels of the affine ops share them.
// One warp walks along the channels of a row.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/visit.h"
#include "cuda/enqueue.cuh"
#include "cuda/packed.cuh"
#include "cuda/reduce.cuh"
#include "ops/affine_common/affine_args.h"

namespace starflow::cuda {

template <class T>
struct Scale {
    T scale;
    T log_scale;
    T log_slope;  // d log(scale) / d log_half
};

// A gradient times the slope of a clamp: zero where the slope is, whatever comes through, which may be infinite there.
template <class T>
__device__ T through_clamp(T gradient, T slope) {
    return slope > T(0) ? gradient * slope : T(0);
}

// s * tanh(raw / s), and its slope.
template <class T>
__device__ T clipped(T raw, T bound, T& slope) {
    if (bound == T(0)) {
        slope = T(1);
        return raw;
    }
    const T t = tanh(raw / bound);
    slope = (T(1) - t) * (T(1) + t);
    return bound * t;
}

// NaN passes through both comparisons.
template <class T>
__device__ T clamped(T x, T lo, T hi) {
    return x < lo ? lo : (x > hi ? hi : x);
}

template <class T>
__device__ Scale<T> scale_of(ScaleActivation activation, T log_half) {
    const T limit = static_cast<T>(log_scale_limit);
    switch (activation) {
        case ScaleActivation::exponential: {
            const T log_scale = clamped(log_half, -limit, limit);
            return {exp(log_scale), log_scale, log_half >= -limit && log_half <= limit ? T(1) : T(0)};
        }
        case ScaleActivation::softplus: {
            const T top = static_cast<T>(scale_limit);
            const T biased = log_half + static_cast<T>(softplus_bias);
            const T u = clamped(biased, -limit, top);
            const T decay = exp(u > limit || u < -limit ? -limit : -abs(u));
            const T scale = (u > T(0) ? u : T(0)) + log1p(decay);
            const T sigmoid = (u < T(0) ? decay : T(1)) / (T(1) + decay);
            const T inside = biased >= -limit && biased <= top ? T(1) : T(0);
            return {scale, log(scale), inside * sigmoid / scale};
        }
        default:
            return {T(1), T(0), T(0)};
    }
}

// The two halves of raw for `width` channels.
template <class T, int width>
struct RawTerms {
    T shift[width];
    T shift_slope[width];
    T log_half_slope[width];
    Scale<T> scale[width];

    template <class Raw>
    __device__ RawTerms(const Raw* raw, const AffineShape& shape, int64_t c) {
        const bool shift_only = shape.options.activation == ScaleActivation::none;
        const T bound = static_cast<T>(shape.options.soft_clip);
        T log_half[width] = {};
        if (!shift_only) load<width>(raw + c, log_half);
        load<width>(raw + c + (shift_only ? 0 : shape.channels), shift);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            shift[i] = clipped(shift[i], bound, shift_slope[i]);
            scale[i] = scale_of(shape.options.activation, clipped(log_half[i], bound, log_half_slope[i]));
        }
    }
};

// The row of this warp, or past the end.
__device__ inline int64_t row_of_warp() {
    return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / warp_size;
}

template <int width, class Storage>
__device__ void copy_row(const Storage* from, Storage* to, int64_t channels) {
    for (int64_t c = lane() * width; c < channels; c += warp_size * width) {
        *reinterpret_cast<Packed<Storage, width>*>(to + c) = *reinterpret_cast<const Packed<Storage, width>*>(from + c);
    }
}

template <int width, class Storage>
__device__ void zero_row(Storage* to, int64_t channels) {
    for (int64_t c = lane() * width; c < channels; c += warp_size * width) {
        *reinterpret_cast<Packed<Storage, width>*>(to + c) = Packed<Storage, width>{};
    }
}

// Call launch(data type, raw type, width, blocks, threads) for the rows of `shape`, 16 bytes of data a lane where
// `all_aligned(width)`. Returns its code.
template <class AllAligned, class Launch>
inline int launch_affine(const AffineShape& shape, const AllAligned& all_aligned, const Launch& launch) {
    const int64_t rows = shape.batch * shape.tokens;
    if (rows == 0) return 0;
    constexpr int threads = 256;
    const auto blocks = static_cast<unsigned>((rows * warp_size + threads - 1) / threads);
    int code = 0;
    visit_data_and_raw(shape.data, shape.raw, [&](auto data, auto raw) {
        constexpr int width = 16 / sizeof(typename decltype(data)::type);
        if (shape.channels % width == 0 &&
            all_aligned(width, sizeof(typename decltype(data)::type), sizeof(typename decltype(raw)::type))) {
            code = launch(data, raw, Constant<width>{}, blocks, threads);
        } else {
            code = launch(data, raw, Constant<1>{}, blocks, threads);
        }
    });
    return code;
}

}  // namespace starflow::cuda
