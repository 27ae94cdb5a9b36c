// 2 to a power by one instruction.
#pragma once

namespace starflow::cuda {

// Within 2^-22 of the value, relative; results below 2^-126 are 0. The C function costs four instructions more, to
// serve those.
__device__ inline float power_of_two(float power) {
#ifdef __CUDA_ARCH__
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(power));
    return value;
#else
    return exp2f(power);
#endif
}

}  // namespace starflow::cuda
