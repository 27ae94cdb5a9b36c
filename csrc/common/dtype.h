// Storage types as kernels see them: no torch, no std.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define STARFLOW_HOST_DEVICE __host__ __device__
#else
#define STARFLOW_HOST_DEVICE
#endif

namespace starflow {

enum class Dtype : int32_t { float32, bfloat16, float16, float64 };
inline constexpr const char* dtype_names[]{"float32", "bfloat16", "float16", "float64"};

// 16-bit storage types hold bits; arithmetic on them is float32 and happens in registers.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// Storage type to the type of the arithmetic: float64 stays, all others are computed in float32.
template <class Storage>
struct Arithmetic {
    using type = float;
};
template <>
struct Arithmetic<double> {
    using type = double;
};

}  // namespace starflow
