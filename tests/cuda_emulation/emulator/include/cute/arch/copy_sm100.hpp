// CuTe's tcgen05.ld on the emulated device: the hardware's atoms are renamed away.
#pragma once
#include <cuda_runtime.h>

#define SM100_TMEM_LOAD_16dp256b2x SM100_TMEM_LOAD_16dp256b2x_of_hardware
#define SM100_TMEM_LOAD_16dp256b4x SM100_TMEM_LOAD_16dp256b4x_of_hardware
#define SM100_TMEM_LOAD_32dp32b32x SM100_TMEM_LOAD_32dp32b32x_of_hardware
#include_next <cute/arch/copy_sm100.hpp>
#undef SM100_TMEM_LOAD_16dp256b2x
#undef SM100_TMEM_LOAD_16dp256b4x
#undef SM100_TMEM_LOAD_32dp32b32x

namespace cute::SM100::TMEM::LOAD {

template <bool of_16_lanes, int registers>
struct EmulatedLoad {
    using SRegisters = uint32_t[1];
    using DRegisters = uint32_t[registers];

    // An object, so that there is one for every number of registers.
    struct Copy {
        template <class... Registers>
        void operator()(uint32_t place, Registers&... to) const {
            static_assert(sizeof...(to) == registers);
            uint32_t* const all[] = {&to...};
            emulation::load_tensor_memory(place, of_16_lanes, registers, all);
        }
    };
    static constexpr Copy copy{};
};
struct SM100_TMEM_LOAD_16dp256b2x : EmulatedLoad<true, 8> {};
struct SM100_TMEM_LOAD_16dp256b4x : EmulatedLoad<true, 16> {};
struct SM100_TMEM_LOAD_32dp32b32x : EmulatedLoad<false, 32> {};

}  // namespace cute::SM100::TMEM::LOAD
