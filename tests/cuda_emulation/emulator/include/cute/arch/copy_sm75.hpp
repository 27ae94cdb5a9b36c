// CuTe's ldmatrix on the emulated device: the hardware's atoms are renamed away.
#pragma once
#include <cuda_runtime.h>

#define SM75_U32x1_LDSM_N SM75_U32x1_LDSM_N_of_hardware
#define SM75_U32x2_LDSM_N SM75_U32x2_LDSM_N_of_hardware
#define SM75_U32x4_LDSM_N SM75_U32x4_LDSM_N_of_hardware
#define SM75_U16x2_LDSM_T SM75_U16x2_LDSM_T_of_hardware
#define SM75_U16x4_LDSM_T SM75_U16x4_LDSM_T_of_hardware
#define SM75_U16x8_LDSM_T SM75_U16x8_LDSM_T_of_hardware
#include_next <cute/arch/copy_sm75.hpp>
#undef SM75_U32x1_LDSM_N
#undef SM75_U32x2_LDSM_N
#undef SM75_U32x4_LDSM_N
#undef SM75_U16x2_LDSM_T
#undef SM75_U16x4_LDSM_T
#undef SM75_U16x8_LDSM_T

namespace cute {

template <int matrices, bool transposed>
struct EmulatedLoadMatrices {
    using SRegisters = uint128_t[1];
    using DRegisters = uint32_t[matrices];

    template <class... Registers>
    static void copy(const uint128_t& row, Registers&... out) {
        static_assert(sizeof...(out) == matrices);
        uint32_t loaded[matrices];
        emulation::load_matrices(matrices, transposed, &row, loaded);
        int i = 0;
        ((out = loaded[i++]), ...);
    }
};

struct SM75_U32x1_LDSM_N : EmulatedLoadMatrices<1, false> {};
struct SM75_U32x2_LDSM_N : EmulatedLoadMatrices<2, false> {};
struct SM75_U32x4_LDSM_N : EmulatedLoadMatrices<4, false> {};
struct SM75_U16x2_LDSM_T : EmulatedLoadMatrices<1, true> {};
struct SM75_U16x4_LDSM_T : EmulatedLoadMatrices<2, true> {};
struct SM75_U16x8_LDSM_T : EmulatedLoadMatrices<4, true> {};

}  // namespace cute
