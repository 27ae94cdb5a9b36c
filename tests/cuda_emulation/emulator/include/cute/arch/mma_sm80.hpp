// CuTe's mma.sync on the emulated device: the hardware's atoms are renamed away.
#pragma once
#include <cuda_runtime.h>

#define SM80_16x8x8_F32BF16BF16F32_TN SM80_16x8x8_F32BF16BF16F32_TN_of_hardware
#define SM80_16x8x16_F32BF16BF16F32_TN SM80_16x8x16_F32BF16BF16F32_TN_of_hardware
#define SM80_16x8x8_F32F16F16F32_TN SM80_16x8x8_F32F16F16F32_TN_of_hardware
#define SM80_16x8x16_F32F16F16F32_TN SM80_16x8x16_F32F16F16F32_TN_of_hardware
#define SM80_16x8x4_F32TF32TF32F32_TN SM80_16x8x4_F32TF32TF32F32_TN_of_hardware
#define SM80_16x8x8_F32TF32TF32F32_TN SM80_16x8x8_F32TF32TF32F32_TN_of_hardware
#include_next <cute/arch/mma_sm80.hpp>
#undef SM80_16x8x8_F32BF16BF16F32_TN
#undef SM80_16x8x16_F32BF16BF16F32_TN
#undef SM80_16x8x8_F32F16F16F32_TN
#undef SM80_16x8x16_F32F16F16F32_TN
#undef SM80_16x8x4_F32TF32TF32F32_TN
#undef SM80_16x8x8_F32TF32TF32F32_TN

namespace cute {

// 16 x 8 x depth; CuTe takes the address of fma, so that there is one for each number of registers.
template <emulation::Format format, int depth>
struct EmulatedProductOf4Registers {
    using DRegisters = float[4];
    using ARegisters = uint32_t[4];
    using BRegisters = uint32_t[2];
    using CRegisters = float[4];

    static void fma(float& d0, float& d1, float& d2, float& d3, const uint32_t& a0, const uint32_t& a1,
                    const uint32_t& a2, const uint32_t& a3, const uint32_t& b0, const uint32_t& b1, const float& c0,
                    const float& c1, const float& c2, const float& c3) {
        const uint32_t a[] = {a0, a1, a2, a3};
        const uint32_t b[] = {b0, b1};
        float d[] = {c0, c1, c2, c3};
        emulation::multiply_add(format, depth, d, a, b);
        d0 = d[0];
        d1 = d[1];
        d2 = d[2];
        d3 = d[3];
    }
};

template <emulation::Format format, int depth>
struct EmulatedProductOf2Registers {
    using DRegisters = float[4];
    using ARegisters = uint32_t[2];
    using BRegisters = uint32_t[1];
    using CRegisters = float[4];

    static void fma(float& d0, float& d1, float& d2, float& d3, const uint32_t& a0, const uint32_t& a1,
                    const uint32_t& b0, const float& c0, const float& c1, const float& c2, const float& c3) {
        const uint32_t a[] = {a0, a1};
        float d[] = {c0, c1, c2, c3};
        emulation::multiply_add(format, depth, d, a, &b0);
        d0 = d[0];
        d1 = d[1];
        d2 = d[2];
        d3 = d[3];
    }
};

struct SM80_16x8x8_F32BF16BF16F32_TN : EmulatedProductOf2Registers<emulation::Format::bfloat16, 8> {};
struct SM80_16x8x16_F32BF16BF16F32_TN : EmulatedProductOf4Registers<emulation::Format::bfloat16, 16> {};
struct SM80_16x8x8_F32F16F16F32_TN : EmulatedProductOf2Registers<emulation::Format::float16, 8> {};
struct SM80_16x8x16_F32F16F16F32_TN : EmulatedProductOf4Registers<emulation::Format::float16, 16> {};
struct SM80_16x8x4_F32TF32TF32F32_TN : EmulatedProductOf2Registers<emulation::Format::tf32, 4> {};
struct SM80_16x8x8_F32TF32TF32F32_TN : EmulatedProductOf4Registers<emulation::Format::tf32, 8> {};

}  // namespace cute
