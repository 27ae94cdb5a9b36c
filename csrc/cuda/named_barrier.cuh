// A barrier of some warps of a block. tests/cuda_emulation has this file for a device in software.
#pragma once
#include <cuda_runtime.h>

namespace starflow::cuda {

// A barrier of `threads` threads, whole warps that all come here; barrier 0 is __syncthreads. CUTLASS's own barrier
// does not tell the compiler that memory changes.
template <int threads>
__device__ void sync_named(int barrier) {
    asm volatile("bar.sync %0, %1;" : : "r"(barrier), "n"(threads) : "memory");
}

// Counts for those `threads` as having come, without waiting for the others.
template <int threads>
__device__ void arrive_named(int barrier) {
    asm volatile("bar.arrive %0, %1;" : : "r"(barrier), "n"(threads) : "memory");
}

}  // namespace starflow::cuda
