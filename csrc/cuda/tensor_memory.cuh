// The order of tensor memory's asynchronous instructions (tcgen05) around what synchronises threads: a thread that has
// read or written tensor memory comes to the first before it tells others by a barrier, and a thread that touches what
// others have read or written comes to the second once it was told. tcgen05.commit does the first by itself. CUTLASS
// has neither. tests/cuda_emulation has this file for a device in software.
#pragma once
#include <cuda_runtime.h>

namespace starflow::cuda {

__device__ inline void fence_tensor_memory_before_barrier() {
    asm volatile("tcgen05.fence::before_thread_sync;" : : : "memory");
}

__device__ inline void fence_tensor_memory_after_barrier() {
    asm volatile("tcgen05.fence::after_thread_sync;" : : : "memory");
}

}  // namespace starflow::cuda
