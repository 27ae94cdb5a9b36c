// CuTe's address of shared memory, in the emulated window.
#pragma once
#include <cuda_runtime.h>

#define cast_smem_ptr_to_uint cast_smem_ptr_to_uint_of_hardware
#include_next <cute/arch/util.hpp>
#undef cast_smem_ptr_to_uint

namespace cute {
inline uint32_t cast_smem_ptr_to_uint(const void* pointer) { return emulation::shared_address(pointer); }
}  // namespace cute
