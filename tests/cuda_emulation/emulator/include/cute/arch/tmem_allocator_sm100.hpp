// CuTe's allocation of tensor memory on the emulated device: the hardware's is renamed away.
#pragma once
#include <cuda_runtime.h>

#define Allocator1Sm Allocator1Sm_of_hardware
#include_next <cute/arch/tmem_allocator_sm100.hpp>
#undef Allocator1Sm

namespace cute::TMEM {

struct Allocator1Sm {
    static constexpr int ColumnsPerAllocationSlice = 32;
    static constexpr int Sm100TmemCapacityColumns = 512;

    void allocate(int columns, uint32_t* place) {
        emulation::allocate_tensor_memory(static_cast<uint32_t>(columns), place);
    }
    void free(uint32_t place, int columns) {
        emulation::free_tensor_memory(place, static_cast<uint32_t>(columns));
    }
    void release_allocation_lock() { emulation::relinquish_tensor_memory(); }
};

}  // namespace cute::TMEM
