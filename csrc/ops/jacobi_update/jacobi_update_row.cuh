// Shift and scale of a row with guidance, on the device: what jacobi_update and jacobi_solve share. The formula is in
// jacobi_update.h.
#pragma once
#include "ops/affine_common/affine_terms.cuh"

namespace starflow::cuda {

template <class T, int width>
struct GuidedTerms {
    T shift[width];
    T scale[width];

    // The terms of channels from c on. `free` is the row of the unconditional half, read where the weight is above 0.
    template <class Raw>
    __device__ GuidedTerms(const Raw* raw, const Raw* free, T weight, const AffineShape& shape, int64_t c) {
        const RawTerms<T, width> terms(raw, shape, c);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            shift[i] = terms.shift[i];
            scale[i] = terms.scale[i].scale;
        }
        if (!(weight > T(0))) return;
        const RawTerms<T, width> other(free, shape, c);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            T ratio = scale[i] / other.scale[i].scale;
            ratio = ratio > T(1) ? T(1) : ratio;
            const T pull = weight * ratio * ratio;
            const T precision = T(1) + weight - pull;
            shift[i] = ((T(1) + weight) * shift[i] - pull * other.shift[i]) / precision;
            scale[i] /= sqrt(precision);
        }
    }
};

}  // namespace starflow::cuda
