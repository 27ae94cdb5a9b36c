// What blocks of a launch tell others of the same launch that begin after them, by counts in memory.
// tests/cuda_emulation has this file for a device in software.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace starflow::cuda {

// Counts one more. One thread calls this: what it has seen to be written, by a barrier, is in memory before.
__device__ inline void signal(int32_t* count) {
    __threadfence();
    atomicAdd(count, 1);
}

// Wait until a count has come to `least`: what was written before it was counted may be read from here on. Blocks begin
// in the order of their numbers, so waiting for those of lower numbers, which wait for nobody, comes to an end.
__device__ inline void wait_for_signals(const int32_t* count, int32_t least) {
    int32_t seen = 0;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
    } while (seen < least);
}

// TMA reads memory by another way than threads write it: between the two both sides come here.
__device__ inline void fence_proxy_of_memory() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.global;" : : : "memory");
#endif
}

}  // namespace starflow::cuda
