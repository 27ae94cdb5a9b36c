// CUTLASS's places of a thread, which are 0 on a host.
#pragma once
#include <cuda_runtime.h>

#define canonical_lane_idx canonical_lane_idx_of_hardware
#define canonical_warp_idx canonical_warp_idx_of_hardware
#define canonical_warp_idx_sync canonical_warp_idx_sync_of_hardware
#define canonical_warp_group_idx canonical_warp_group_idx_of_hardware
#include_next <cutlass/cutlass.h>
#undef canonical_lane_idx
#undef canonical_warp_idx
#undef canonical_warp_idx_sync
#undef canonical_warp_group_idx

namespace cutlass {
inline int canonical_lane_idx() { return static_cast<int>(threadIdx.x % 32); }
inline int canonical_warp_idx() { return static_cast<int>(threadIdx.x / 32); }
inline int canonical_warp_idx_sync() { return static_cast<int>(threadIdx.x / 32); }
inline int canonical_warp_group_idx() { return static_cast<int>(threadIdx.x / 128); }
}  // namespace cutlass
