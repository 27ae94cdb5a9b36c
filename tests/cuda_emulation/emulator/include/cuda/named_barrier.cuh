// csrc/cuda/named_barrier.cuh for the emulated device.
#pragma once
#include <cuda_runtime.h>

namespace starflow::cuda {

template <int threads>
void sync_named(int barrier) {
    emulation::barrier(barrier, threads);
}

template <int threads>
void arrive_named(int barrier) {
    emulation::arrive_at_barrier(barrier, threads);
}

}  // namespace starflow::cuda
