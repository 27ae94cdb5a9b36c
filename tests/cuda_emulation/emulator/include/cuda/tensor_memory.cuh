// csrc/cuda/tensor_memory.cuh for the emulated device.
#pragma once
#include <cuda_runtime.h>

namespace starflow::cuda {

inline void fence_tensor_memory_before_barrier() { emulation::fence_tensor_memory_before(); }
inline void fence_tensor_memory_after_barrier() { emulation::fence_tensor_memory_after(); }

}  // namespace starflow::cuda
