// CuTe's hint for a tensor map on the emulated device, which needs none.
#pragma once
#include <cuda_runtime.h>

#define prefetch_tma_descriptor prefetch_tma_descriptor_of_hardware
#include_next <cute/arch/copy_sm90_desc.hpp>
#undef prefetch_tma_descriptor

namespace cute {
inline void prefetch_tma_descriptor(const TmaDescriptor*) {}
}  // namespace cute
