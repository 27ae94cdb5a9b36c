// CuTe's tcgen05.mma of 16 bits on the emulated device: the hardware's is renamed away.
#pragma once
#include <cuda_runtime.h>

#define SM100_MMA_F16BF16_SS SM100_MMA_F16BF16_SS_of_hardware
#include_next <cute/arch/mma_sm100_umma.hpp>
#undef SM100_MMA_F16BF16_SS

namespace cute {

template <class a_type, class b_type, class c_type, int M, int N, UMMA::Major a_major, UMMA::Major b_major,
          UMMA::ScaleIn a_neg = UMMA::ScaleIn::One, UMMA::ScaleIn b_neg = UMMA::ScaleIn::One>
struct SM100_MMA_F16BF16_SS {
    using DRegisters = void;
    using ARegisters = uint64_t[1];
    using BRegisters = uint64_t[1];
    using CRegisters = uint32_t[1];

    static void fma(uint64_t left, uint64_t right, uint32_t sums, uint32_t scale, uint64_t instruction) {
        if (emulation::elect()) {
            emulation::multiply_in_tensor_memory(left, right, sums, static_cast<uint32_t>(instruction >> 32),
                                                 scale != 0);
        }
    }
};

}  // namespace cute
