// CuTe's TMA on the emulated device: the hardware's atoms are renamed away.
#pragma once
#include <cuda_runtime.h>

#define SM90_TMA_LOAD SM90_TMA_LOAD_of_hardware
#define SM90_TMA_LOAD_1D SM90_TMA_LOAD_1D_of_hardware
#define SM90_TMA_LOAD_2D SM90_TMA_LOAD_2D_of_hardware
#define SM90_TMA_LOAD_3D SM90_TMA_LOAD_3D_of_hardware
#define SM90_TMA_LOAD_4D SM90_TMA_LOAD_4D_of_hardware
#define SM90_TMA_LOAD_5D SM90_TMA_LOAD_5D_of_hardware
#include_next <cute/arch/copy_sm90_tma.hpp>
#undef SM90_TMA_LOAD
#undef SM90_TMA_LOAD_1D
#undef SM90_TMA_LOAD_2D
#undef SM90_TMA_LOAD_3D
#undef SM90_TMA_LOAD_4D
#undef SM90_TMA_LOAD_5D

namespace cute {

struct SM90_TMA_LOAD {
    template <class... Coordinates>
    static void copy(const void* map, uint64_t* mbarrier, uint64_t, void* to, const Coordinates&... coordinates) {
        const int all[] = {coordinates...};
        emulation::copy_tensor(map, mbarrier, to, all, sizeof...(coordinates));
    }
    struct PREFETCH {
        template <class... Coordinates>
        static void copy(const void*, const Coordinates&...) {}
    };
};
using SM90_TMA_LOAD_1D = SM90_TMA_LOAD;
using SM90_TMA_LOAD_2D = SM90_TMA_LOAD;
using SM90_TMA_LOAD_3D = SM90_TMA_LOAD;
using SM90_TMA_LOAD_4D = SM90_TMA_LOAD;
using SM90_TMA_LOAD_5D = SM90_TMA_LOAD;

}  // namespace cute
