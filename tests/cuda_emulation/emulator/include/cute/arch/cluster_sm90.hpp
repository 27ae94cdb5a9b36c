// CuTe's election of a lane on the emulated device.
#pragma once
#include <cuda_runtime.h>

#define elect_one_sync elect_one_sync_of_hardware
#include_next <cute/arch/cluster_sm90.hpp>
#undef elect_one_sync

namespace cute {
inline uint32_t elect_one_sync() { return emulation::elect(); }
}  // namespace cute
