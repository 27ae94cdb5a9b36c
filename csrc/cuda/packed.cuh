// Wide loads and stores of a storage type, computed in the type of the arithmetic.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dtype.h"

namespace starflow::cuda {

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
__device__ inline float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

__device__ inline void narrow(float value, float& out) { out = value; }
__device__ inline void narrow(double value, double& out) { out = value; }
__device__ inline void narrow(float value, BFloat16& out) {
    out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
__device__ inline void narrow(float value, Float16& out) { out.bits = __half_as_ushort(__float2half_rn(value)); }

// `width` neighbours as one access; the address is a multiple of its size.
template <class Storage, int width>
struct alignas(sizeof(Storage) * width) Packed {
    Storage values[width];
};

template <int width, class Storage, class T>
__device__ void load(const Storage* p, T (&out)[width]) {
    const auto packed = *reinterpret_cast<const Packed<Storage, width>*>(p);
#pragma unroll
    for (int i = 0; i < width; ++i) out[i] = widen(packed.values[i]);
}

template <int width, class Storage, class T>
__device__ void store(Storage* p, const T (&values)[width]) {
    Packed<Storage, width> packed;
#pragma unroll
    for (int i = 0; i < width; ++i) narrow(values[i], packed.values[i]);
    *reinterpret_cast<Packed<Storage, width>*>(p) = packed;
}

}  // namespace starflow::cuda
