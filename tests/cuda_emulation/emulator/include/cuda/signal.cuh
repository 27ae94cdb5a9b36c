// csrc/cuda/signal.cuh for the emulated device, where blocks run one after another in the order of their numbers: a
// block that waits for one that has not run would wait for ever, and might on a device.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace starflow::cuda {

inline void signal(int32_t* count) {
    __threadfence();
    atomicAdd(count, 1);
}

inline void wait_for_signals(const int32_t* count, int32_t least) {
    const auto seen = static_cast<int32_t>(emulation::acquire(count));
    if (seen != least) emulation::fail("waits for %d signals of earlier blocks, of which %d have come", least, seen);
}

inline void fence_proxy_of_memory() {}

}  // namespace starflow::cuda
