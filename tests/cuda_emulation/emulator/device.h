// What CUDA gives to device code without an #include, on top of the emulated device.
#pragma once
#include <math.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "runtime.h"

#undef __shared__
// The library's thread-local memory, which the runtime finds; a section of its own is not for variables in templates.
#define __shared__ static thread_local
#undef __launch_bounds__
#define __launch_bounds__(...)
// Without always_inline, which the compiler refuses across different sanitizer settings.
#undef __forceinline__
#define __forceinline__ inline

extern "C" {
extern const char __ehdr_start[] __attribute__((visibility("hidden")));
extern const char _end[] __attribute__((visibility("hidden")));
}

static constexpr int warpSize = 32;

inline void __syncthreads() { emulation::barrier(0, 0); }
inline int __syncthreads_count(int value) {
    int arrived = 0;
    return emulation::barrier_count(value != 0, &arrived);
}
inline int __syncthreads_or(int value) { return __syncthreads_count(value) > 0; }
inline int __syncthreads_and(int value) {
    int arrived = 0;
    return emulation::barrier_count(value != 0, &arrived) == arrived;
}
inline void __syncwarp(unsigned mask = ~0U) { emulation::warp_barrier(mask); }
inline unsigned __activemask() { return ~0U; }

inline unsigned __ballot_sync(unsigned mask, int value) { return emulation::ballot(mask, "__ballot_sync", value != 0); }
inline int __any_sync(unsigned mask, int value) { return emulation::ballot(mask, "__any_sync", value != 0) != 0; }
inline int __all_sync(unsigned mask, int value) { return emulation::ballot(mask, "__all_sync", value == 0) == 0; }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
    const int first = emulation::lane() & ~(width - 1);
    emulation::shuffle(mask, "__shfl_sync", &value, sizeof(T), first | (source & (width - 1)));
    return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
    const int lane = emulation::lane();
    const int source = lane ^ lanes;
    emulation::shuffle(mask, "__shfl_xor_sync", &value, sizeof(T), source / width > lane / width ? lane : source);
    return value;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes, int width = warpSize) {
    const int lane = emulation::lane();
    const bool inside = lane % width + lanes < width;
    emulation::shuffle(mask, "__shfl_down_sync", &value, sizeof(T), inside ? lane + lanes : lane);
    return value;
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes, int width = warpSize) {
    const int lane = emulation::lane();
    const bool inside = lane % width >= lanes;
    emulation::shuffle(mask, "__shfl_up_sync", &value, sizeof(T), inside ? lane - lanes : lane);
    return value;
}

// Fibers change places only in calls of the emulation, so that a read, a change and a write are one.
template <class T, class Change>
__attribute__((no_sanitize("thread"), noinline)) T emulated_atomic(T* address, const Change& change) {
    emulation::note_atomic(address, sizeof(T));
    const T old = *address;
    *address = change(old);
    return old;
}
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
    return emulated_atomic(address, [value](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
    return emulated_atomic(address, [value](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
    return emulated_atomic(address, [value](T old) { return value < old ? value : old; });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
    return emulated_atomic(address, [value](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    return emulated_atomic(address, [=](T old) { return old == expected ? value : old; });
}
inline void __threadfence() { emulation::fence_memory(); }
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulation::pause(); }

template <class T>
T __ldg(const T* address) {
    return *address;
}
template <class T>
T __ldcs(const T* address) {
    return *address;
}
template <class T>
void __stcs(T* address, T value) {
    *address = value;
}

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned choice = selector >> (4 * i) & 15U;
        unsigned byte = static_cast<unsigned>(both >> (8 * (choice & 7U))) & 255U;
        if ((choice & 8U) != 0) byte = (byte & 128U) != 0 ? 255U : 0U;
        result |= byte << (8 * i);
    }
    return result;
}

inline float rsqrtf(float x) { return 1.0F / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrt(float x) { return 1.0F / sqrtf(x); }
// The fast intrinsics in full precision: their bound is for the machine code to keep.
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0F / x; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

template <class T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}

inline size_t __cvta_generic_to_shared(const void* pointer) { return emulation::shared_address(pointer); }
