// Wide loads and stores of a storage type, computed in the type of the arithmetic.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/rows.h"

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

// The widest access of a thread, in bytes.
inline constexpr int widest_access = 16;

// `width` neighbours as one access; the address is a multiple of its size.
template <class Storage, int width>
struct alignas(sizeof(Storage) * width) Packed {
    Storage values[width];
};

// How many of `width` neighbours one access takes.
template <class Storage, int width>
inline constexpr int neighbours = sizeof(Storage) * width <= widest_access ? width : widest_access / sizeof(Storage);

template <int width, class Storage, class T>
__device__ void load(const Storage* p, T (&out)[width]) {
    constexpr int together = neighbours<Storage, width>;
#pragma unroll
    for (int first = 0; first < width; first += together) {
        const auto packed = *reinterpret_cast<const Packed<Storage, together>*>(p + first);
#pragma unroll
        for (int i = 0; i < together; ++i) out[first + i] = widen(packed.values[i]);
    }
}

template <int width, class Storage, class T>
__device__ void store(Storage* p, const T (&values)[width]) {
    constexpr int together = neighbours<Storage, width>;
#pragma unroll
    for (int first = 0; first < width; first += together) {
        Packed<Storage, together> packed;
#pragma unroll
        for (int i = 0; i < together; ++i) narrow(values[first + i], packed.values[i]);
        *reinterpret_cast<Packed<Storage, together>*>(p + first) = packed;
    }
}

// Whether an address, and every one at multiples of the strides (in elements) from it, takes `width` neighbours.
template <class... Strides>
bool aligned(const void* data, int64_t width, int64_t size, Strides... strides) {
    const int64_t bytes = width * size < widest_access ? width * size : widest_access;
    return reinterpret_cast<uintptr_t>(data) % bytes == 0 && ((strides * size % bytes == 0) && ...);
}
inline bool aligned(const Rows& rows, int64_t width, int64_t size) {
    return aligned(rows.data, width, size, rows.batch_stride, rows.token_stride);
}

}  // namespace starflow::cuda
